"""Average pooling of scores over neighbouring keys, traceable with a symbolic length."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def average_pooled(scores: Tensor, prefix: Tensor, kernel_size: int) -> Tensor:
    """Mean of those of the ``kernel_size`` nearest keys that ``prefix`` holds.

    Args:
        scores: ``[B, H, K]`` float32.
        prefix: ``[1 or B, 1, K]`` bool: the keys that are scored, without a gap in a row.
        kernel_size: odd.

    Returns:
        ``[B, H, K]`` float32, 0 outside of the prefix.
    """
    summed = _mean_with_zeros(scores.masked_fill(~prefix, 0.0), kernel_size)
    # The same of the mask is the share of the neighbours that count: both have one divisor.
    share = _mean_with_zeros(prefix.float(), kernel_size)
    return (summed / share.clamp(min=1 / (2 * kernel_size))).masked_fill(~prefix, 0.0)


def _mean_with_zeros(scores: Tensor, kernel_size: int) -> Tensor:
    """Average pooling that takes zeros beyond both ends."""
    # avg_pool1d specialises a symbolic length, and avg_pool2d is slow to trace.
    return F.pad(scores, (kernel_size // 2, kernel_size // 2)).unfold(-1, kernel_size, 1).mean(-1)
