"""Attention of few queries on CPUs, what a decode step does: all threads read the cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import few_queries as cpu
from .cpu.build import SUFFIX

MOST_ROWS, DTYPES = cpu.MOST_ROWS_DENSE, tuple(SUFFIX)


def _decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """``scaled_dot_product_attention(query, key, value, mask, scale=scale)`` of few queries.

    Args:
        query: ``[B, H, Q, D]``, for speed of at most ``MOST_ROWS`` queries.
        key, value: ``[B, H, K, D]`` and ``[B, H, K, Dv]``, in the query's dtype.
        mask: added to the logits, broadcasts to ``[B, H, Q, K]``.

    Returns:
        ``[B, H, Q, Dv]`` in the query's dtype, contiguous; computed in float32.
    """
    if cpu.takes_dense(query, key, value, mask):
        seen = mask if mask is None else mask.float()
        return cpu.attend_dense(query, key, value, seen, scale).to(query.dtype)
    made = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    return made.to(query.dtype).contiguous()


# Not torch.library.custom_op, which takes as long for a call as a short cache does to be read.
_library = torch.library.Library("ckv_compile", "FRAGMENT")
_library.define(
    "decode_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale) -> Tensor"
)
_library.impl("decode_attention", _decode_attention, "CPU")


@torch.library.register_fake("ckv_compile::decode_attention")
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])
