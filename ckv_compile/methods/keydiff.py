"""KeyDiff (arXiv 2504.15364): keys unlike the others."""

from __future__ import annotations

import torch.nn.functional as F

from .base import ScoreInputs, Scores


def keydiff(inputs: ScoreInputs) -> Scores:
    """``-cos(k_i, mean_j k_j / ||k_j||)`` over the row's own keys: no query is read.

    Half of the scores may be negative, so it is no base of CriticalKV's. A key of zeros scores 0.
    """
    keys = F.normalize(inputs.key.float(), dim=-1)  # [B, Hkv, K, D]
    seen = keys if inputs.real is None else keys * inputs.real[:, None, :, None]
    # The sum points where the mean does.
    anchor = F.normalize(seen.sum(2, keepdim=True), dim=-1)
    return Scores(-(keys * anchor).sum(-1))
