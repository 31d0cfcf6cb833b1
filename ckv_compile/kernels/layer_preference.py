"""How much of a common budget a layer asks for: CAKE's preference (arXiv 2503.12491)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .attention_rows import rows_in_blocks

# The paper's temperatures of the two factors.
TAU_ENTROPY, TAU_VARIANCE = 1.6, 0.6


def layer_preference(
    query: Tensor, key: Tensor, scale: Any, window_size: int, real: Tensor | None = None
) -> Tensor:
    """Twin of :func:`ckv_compile.kernels.reference_packed.layer_preference`, traceable.

    Args:
        query: ``[B, H, Q, D]``, any float dtype.
        key: ``[B, Hkv, K, D]``; the queries are those of the last ``Q`` keys.
        scale: SDPA's scale, None for ``1/sqrt(D)``.
        window_size: the queries that are read, a row's last ones; their keys are not.
        real: ``[B, K]`` bool, False at pads; None for no pads.

    Returns:
        ``[B]`` float32, ``H^(1/1.6) * V^(1/0.6)``: ``H = -sum A log A`` over the window's queries,
        all heads and the keys before the window, and ``V = sum Var_t A[t]`` over heads and keys,
        the variance among the queries t. 0 where no key is before the window.
    """
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    return torch.ops.ckv_compile.layer_preference(query, key, scale, window_size, real)


# An op of ours, opaque to the compiler, which would write all rows [B, H, W, K] to memory.
@torch.library.custom_op("ckv_compile::layer_preference", mutates_args=())
def _layer_preference(
    query: Tensor, key: Tensor, scale: float, window_size: int, real: Tensor | None
) -> Tensor:
    (batch, heads, q_len, _), (kv_heads, kv_len) = query.shape, key.shape[1:3]
    first, groups = kv_len - q_len, heads // kv_heads
    moments = query.new_zeros((2, batch), dtype=torch.float32)
    positions = torch.arange(kv_len, device=key.device)
    for b in range(batch):
        # Each row as if it were alone: its keys, and the last of its queries.
        row = positions if real is None else positions[real[b]]
        prefix = max(len(row) - window_size, 0)
        queries = (row[row >= first] - first)[-window_size:]
        for g in range(kv_heads if prefix and len(queries) else 0):
            members = slice(g * groups, (g + 1) * groups)
            keys = key[b, g].index_select(0, row).float()
            operands = (query[b, members], keys, queries, row, scale, None, None, None, True)
            moments[:, b] += _moments(rows[:, :, :prefix] for rows in rows_in_blocks(*operands))
    entropy, variance = moments
    return entropy ** (1 / TAU_ENTROPY) * variance ** (1 / TAU_VARIANCE)


@_layer_preference.register_fake
def _(query: Tensor, key: Tensor, *options: Any) -> Tensor:
    return query.new_empty(query.shape[0], dtype=torch.float32)


def _moments(blocks: Iterable[Tensor]) -> Tensor:
    """Entropy and summed variance ``[2]`` of rows ``[G, t, k]`` that come some at a time.

    The variance is summed about the mean of the rows so far (Chan): the mean of the squares less
    the square of the mean would leave rounding alone of keys that all queries see alike.
    """
    count, mean, about, entropy = 0, 0.0, 0.0, 0.0
    for rows in blocks:
        entropy = entropy - torch.special.xlogy(rows, rows).sum()
        new, own = rows.shape[1], rows.mean(1, keepdim=True)
        apart = own - mean
        about = about + (rows - own).square().sum()
        about = about + apart.square().sum() * (count * new / (count + new))
        count += new
        mean = mean + apart * (new / count)
    assert count
    return torch.stack([torch.as_tensor(entropy), torch.as_tensor(about) / count])
