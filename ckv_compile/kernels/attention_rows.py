"""Attention row by row: what scores read of single queries, and not of the window's mean."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the attention of one block of queries: a few rows of it exist at a time.
_BLOCK_BYTES = 4 << 20


def attention_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: Any,
    window_size: int,
    asked: int | None,
    reduce: str,
    kernel_size: int = 1,
    softcap: Any = None,
    real: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Twin of :func:`ckv_compile.kernels.reference.attention_rows`, traceable, on any device.

    Args:
        query: ``[B, H, Q, D]``, any float dtype.
        key: ``[B, Hkv, K, D]``; if ``causal`` the queries are those of the last ``Q`` keys.
        value: ``[B, Hkv, K, Dv]``, for "drop" alone.
        scale: SDPA's scale, None for ``1/sqrt(D)``.
        window_size: that many of a row's last keys are not scored; all are, if not ``causal``.
        asked: that many of a row's last queries are read, or None for all of them.
        reduce: what is made of attention ``A[t, i]``, t the queries: "sum"; "mean" over those that
            see the key; "l2", the root of the sum of squares; "max" of rows averaged over
            ``kernel_size`` keys, each row scaled back to its mass; or "drop", the mean of
            ``A / (1 - A) * ||o_t - v_i||_2``, ``o_t = sum_i A[t, i] v_i``.
        softcap, real, bias, sinks: as of the kernel ``window_attention``.

    Returns:
        ``[B, H, K]`` float32; 0 in the window and in pads.
    """
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    return torch.ops.ckv_compile.attention_rows(
        query, key, value, scale, window_size, asked, reduce, kernel_size, softcap, real, bias,
        sinks, causal,
    )  # fmt: skip


# An op of ours, opaque to the compiler, which would write all rows [B, H, Q, K] to memory.
@torch.library.custom_op("ckv_compile::attention_rows", mutates_args=())
def _attention_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: float,
    window_size: int,
    asked: int | None,
    reduce: str,
    kernel_size: int,
    softcap: float | None,
    real: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
) -> Tensor:
    (batch, heads, q_len, _), (kv_heads, kv_len) = query.shape, key.shape[1:3]
    first, groups = kv_len - q_len if causal else 0, heads // kv_heads
    scores = query.new_zeros((batch, heads, kv_len), dtype=torch.float32)
    positions = torch.arange(kv_len, device=key.device)
    if bias is not None:
        bias = bias.expand(batch, heads, q_len, kv_len)
    for b in range(batch):
        # Each row as if it were alone: its keys, and the last of its queries.
        row = positions if real is None else positions[real[b]]
        prefix = max(len(row) - window_size, 0) if causal else kv_len
        queries = row[row >= first] - first if causal else torch.arange(q_len, device=key.device)
        queries = queries if asked is None else queries[-asked:]
        for g in range(kv_heads if prefix and len(queries) else 0):
            members = slice(g * groups, (g + 1) * groups)
            blocks = rows_in_blocks(
                query[b, members],
                key[b, g].index_select(0, row).float(),
                queries,
                row,
                scale,
                softcap,
                None if bias is None else bias[b, members],
                None if sinks is None else sinks[members].float(),
                causal,
            )
            seen = None if value is None else value[b, g].index_select(0, row).float()
            scored = _reduced(blocks, prefix, reduce, kernel_size, seen)
            if reduce in ("mean", "drop"):
                # The last query sees all keys, the one before it all but one, and so on.
                sees = len(row) - torch.arange(prefix, device=key.device)
                scored /= sees.clamp(max=len(queries)) if causal else len(queries)
            scores[b, members, row[:prefix]] = scored
    return scores


@_attention_rows.register_fake
def _(query: Tensor, key: Tensor, *options: Any) -> Tensor:
    shape = (query.shape[0], query.shape[1], key.shape[2])
    return query.new_empty(shape, dtype=torch.float32)


def rows_in_blocks(
    query: Tensor,
    keys: Tensor,
    queries: Tensor,
    row: Tensor,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
) -> Iterator[Tensor]:
    """Attention ``[G, t, k]`` of a KV head, t queries at a time on the k keys that any can see.

    Those at ``queries`` ``[T]`` of ``query`` ``[G, Q, D]``; if causal the last T of ``keys``
    ``[k, D]`` are theirs. ``bias`` is ``[G, Q, K]``, whose keys at ``row`` ``[k]`` these are.
    """
    kv_len, groups, count = len(keys), len(query), len(queries)
    step = max(_BLOCK_BYTES // (4 * groups * kv_len), 1)
    for at in queries.split(step):
        end = kv_len if not causal else kv_len - count + len(at)
        count -= len(at)
        rows = query.index_select(1, at).float() * scale
        logits = rows @ keys[:end].T
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        if bias is not None:
            logits += bias.index_select(1, at).index_select(2, row[:end])
        if causal:
            hidden = torch.ones(logits.shape[1:], dtype=torch.bool, device=keys.device)
            logits.masked_fill_(hidden.triu(end - len(at) + 1), -math.inf)
        lse = logits.logsumexp(-1, keepdim=True)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks[:, None, None])
        # A query that sees no key, for a bias of -inf, attends to none.
        yield logits.sub_(lse.masked_fill(lse == -math.inf, math.inf)).exp_()


def _reduced(
    blocks: Iterator[Tensor], prefix: int, reduce: str, kernel_size: int, value: Tensor | None
) -> Tensor:
    """The sum, the root of the sum of squares or the maximum of all rows, ``[G, prefix]``."""
    total = None
    for rows in blocks:
        if reduce == "max":
            rows = F.pad(rows, (0, max(prefix - rows.shape[2], 0)))
            part = _pooled(rows[:, :, :prefix], kernel_size).amax(1)
        elif reduce == "l2":
            part = rows.square_().sum(1)[:, :prefix]
        else:
            part = (rows if value is None else _change(rows, value)).sum(1)[:, :prefix]
        part = F.pad(part, (0, prefix - part.shape[1]))  # by keys that none of these can see
        if total is None:
            total = part
        else:
            total = total.maximum(part) if reduce == "max" else total.add_(part)
    assert total is not None
    return total.sqrt_() if reduce == "l2" else total


def _change(rows: Tensor, value: Tensor) -> Tensor:
    """``A / (1 - A) * ||o - v||_2``, ``[G, t, k]``, of attention ``A`` on values ``[K, Dv]``.

    Distances are taken as they stand: ``||o||^2 + ||v||^2 - 2 <o, v>`` cancels for the very entries
    that matter, whose value is almost the output, and ``1 / (1 - A)`` would enlarge the error.
    """
    seen = value[: rows.shape[2]]
    mode = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(rows @ seen, seen.expand(len(rows), -1, -1), compute_mode=mode)
    rest = (1 - rows).clamp_(min=torch.finfo(torch.float32).eps)
    return rows / rest * distances


def _pooled(rows: Tensor, kernel_size: int) -> Tensor:
    """The mean of ``kernel_size`` neighbours, none beyond the ends, with the mass each row had."""
    pooled = F.avg_pool1d(rows, kernel_size, stride=1, padding=kernel_size // 2)
    mass = pooled.sum(-1, keepdim=True)
    return pooled * (rows.sum(-1, keepdim=True) / mass.masked_fill(mass == 0, 1.0))
