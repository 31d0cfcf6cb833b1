"""The oracle: METHODS in eager float32, one head at a time. Obvious, never optimised.

Shapes: ``query [B, H, Q, D]``, ``key``, ``value [B, Hkv, K, D]``, ``weight [E, H*Dv]`` as
``nn.Linear`` keeps it (``in_out=False``) or ``[H*Dv, E]`` as GPT-2's Conv1D does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..budget import exact_share


def window_attention(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    window_size: int,
    kernel_size: int,
    softcap: float | None = None,
    real: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """SnapKV scores ``[B, Hkv, K]`` of the keys before the window; 0 in the window and in pads.

    Mean causal attention of the last ``window_size`` queries, max-pooled over the keys before the
    window (and over nothing else), then averaged over the heads of a group (arXiv 2404.14469).
    The queries are those of the last ``Q`` keys; where a window is longer, its last ones score.
    ``real`` ``[B, K]`` is False at pads: each row is scored as if it were alone, without them.
    ``bias`` ``[B, H, Q, K]``, or what broadcasts to it, is added to the logits; ``sinks`` ``[H]``
    are logits of one more key for each head, whose attention is dropped.
    """
    batch, heads, q_len, head_dim = query.shape
    if bias is not None:
        bias = bias.expand(batch, heads, q_len, key.shape[2])
    kv_heads, kv_len = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    scores = torch.zeros(batch, kv_heads, kv_len)
    first = kv_len - query.shape[2]
    for b in range(batch):
        row = torch.arange(kv_len) if real is None else real[b].nonzero()[:, 0]
        prefix = max(len(row) - window_size, 0)
        asking = [rank for rank in range(prefix, len(row)) if row[rank] >= first]
        for h in range(heads if prefix and asking else 0):
            queries = query[b, h, row[asking] - first].float()
            logits = queries @ key[b, h // groups, row].float().T * scale
            if softcap is not None:
                logits = (logits / softcap).tanh() * softcap
            if bias is not None:
                logits = logits + bias[b, h, row[asking] - first][:, row].float()
            for t, rank in enumerate(asking):
                logits[t, rank + 1 :] = -math.inf
            if sinks is not None:
                logits = torch.cat([logits, sinks[h].float().expand(len(asking), 1)], dim=-1)
            attention = logits.softmax(-1).mean(0)[:prefix]
            for i in range(prefix):
                low, high = max(i - kernel_size // 2, 0), i + kernel_size // 2 + 1
                scores[b, h // groups, row[i]] += attention[low:high].max() / groups
    return scores


def cross_attention(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    window_size: int,
    kernel_size: int,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same score where K is an encoder's: every query sees every key, and no key is exempt."""
    batch, heads, _, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    scores = torch.zeros(batch, kv_heads, kv_len)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            logits = query[b, h, -window_size:].float() @ key[b, g].float().T * scale
            if softcap is not None:
                logits = (logits / softcap).tanh() * softcap
            if sinks is not None:
                logits = torch.cat([logits, sinks[h].float().expand(len(logits), 1)], dim=-1)
            attention = logits.softmax(-1).mean(0)[:kv_len]
            for i in range(kv_len):
                low, high = max(i - kernel_size // 2, 0), i + kernel_size // 2 + 1
                scores[b, g, i] += attention[low:high].max() * kv_heads / heads
    return scores


def attention_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: float | None,
    window_size: int,
    asked: int | None,
    reduce: str,
    kernel_size: int = 1,
    softcap: float | None = None,
    real: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """A reduction of single queries' attention, ``[B, H, K]``; 0 in the window and in pads.

    Of the last ``asked`` queries, None for all; otherwise as :func:`window_attention`, or as
    :func:`cross_attention` if not ``causal``. ``reduce`` is "sum", "mean" over the queries that see
    the key, "l2" the root of the sum of squares, "max" of rows averaged over ``kernel_size`` of the
    keys before the window and scaled to the mass they had (DefensiveKV, arXiv 2510.13334), or
    "drop", the mean of ``A / (1 - A) * ||o - v||_2`` (CAOTE, arXiv 2504.14051).
    """
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    scores = torch.zeros(batch, heads, kv_len)
    if bias is not None:
        bias = bias.expand(batch, heads, q_len, kv_len)
    first = kv_len - q_len if causal else 0
    for b in range(batch):
        row = torch.arange(kv_len) if real is None else real[b].nonzero()[:, 0]
        prefix = max(len(row) - window_size, 0) if causal else kv_len
        # Ranks of the queries among the row's keys, and their slots in `query`.
        ranks = [t for t in range(len(row)) if row[t] >= first] if causal else range(q_len)
        ranks = list(ranks)[0 if asked is None else -asked :]
        slots = row[ranks] - first if causal else torch.tensor(ranks)
        seen = [torch.arange(len(row)) <= t if causal else row >= 0 for t in ranks]
        for h in range(heads if prefix and ranks else 0):
            g = h // (heads // kv_heads)
            logits = query[b, h, slots].float() @ key[b, g, row].float().T * scale
            if softcap is not None:
                logits = (logits / softcap).tanh() * softcap
            if bias is not None:
                logits = logits + bias[b, h, slots][:, row].float()
            logits[~torch.stack(seen)] = -math.inf
            if sinks is not None:
                logits = torch.cat([logits, sinks[h].float().expand(len(ranks), 1)], dim=-1)
            attention = logits.softmax(-1)[:, : len(row)]  # [T, K]
            if reduce == "max":
                rows = [pooled_to_its_mass(part, kernel_size) for part in attention[:, :prefix]]
                scored = torch.stack(rows).amax(0)
            elif reduce == "l2":
                scored = attention.norm(dim=0)
            else:
                if reduce == "drop":
                    assert value is not None
                    attention = changes(attention, value[b, g, row].float())
                scored = attention.sum(0)
                if reduce != "sum":
                    scored = scored / torch.stack(seen).sum(0).clamp(min=1)
            scores[b, h, row[:prefix]] = scored[:prefix]
    return scores


def pooled_to_its_mass(row: Tensor, kernel_size: int) -> Tensor:
    """Means over ``kernel_size`` neighbours, zeros beyond the ends, times what keeps the sum."""
    half = kernel_size // 2
    pooled = torch.stack([row[max(i - half, 0) : i + half + 1].sum() for i in range(len(row))])
    return pooled if row.sum() == 0 else pooled * row.sum() / pooled.sum()


def changes(attention: Tensor, value: Tensor) -> Tensor:
    """``A / (1 - A) * ||o - v||_2`` of rows ``[T, K]`` on values ``[K, Dv]``."""
    changed = torch.zeros_like(attention)
    for t, row in enumerate(attention):
        distances = (row @ value - value).norm(dim=-1)
        changed[t] = row / (1 - row).clamp(min=torch.finfo(torch.float32).eps) * distances
    return changed


def projected_norm(
    value: Tensor, weight: Tensor | None, in_out: bool, heads: int, norm: str
) -> Tensor:
    """``||v_i W_O^h||_1`` or ``_2``, averaged over the query heads of a group: ``[B, Hkv, K]``.

    Of the value alone, ``||v_i||_1``, for norm="value".
    """
    batch, kv_heads, kv_len, head_dim = value.shape
    groups = heads // kv_heads
    norms = torch.zeros(batch, kv_heads, kv_len)
    for h in range(heads):
        seen = value[:, h // groups].float()
        if norm != "value":
            assert weight is not None
            rows = weight.float() if in_out else weight.float().T  # [H*Dv, E]
            seen = seen @ rows[h * head_dim : (h + 1) * head_dim]
        norms[:, h // groups] += seen.norm(p=2 if norm == "l2" else 1, dim=-1) / groups
    return norms


def with_adapters(
    weight: Tensor, in_out: bool, adapters: Sequence[tuple[Sequence[Tensor], Sequence[float]]]
) -> Tensor:
    """The matrix by which all branches together multiply, read off what they do to unit vectors.

    Adapters are ``[in, out]`` matrices and factors; the result is laid out like ``weight``.
    """
    base = weight.float() if in_out else weight.float().T
    rows = []
    for unit in torch.eye(len(base)):
        row = unit @ base
        for matrices, factors in adapters:
            part = unit
            for matrix in matrices:
                part = part @ matrix.float()
            row = row + part * math.prod(factors)
        rows.append(row)
    return torch.stack(rows) if in_out else torch.stack(rows).T


def best(scores: list[float], candidates: list[int], count: int) -> list[int]:
    """The ``count`` candidates with the largest scores; of equals the later position."""
    return sorted(candidates, key=lambda i: (scores[i], i), reverse=True)[:count]


def select(
    base: Tensor,
    norm: Tensor | None,
    budget: int,
    window_size: int,
    first_stage_ratio: float,
    epsilon: float,
    real: Tensor | None = None,
    row_budgets: Tensor | None = None,
) -> Tensor:
    """Kept positions ``[B, Hkv, budget]``, ascending; two stages (arXiv 2502.03805, section 4).

    The window is kept by construction and counts. Stage 1 fills up to ``floor(ratio * budget)``
    entries by attention; stage 2 the rest by ``(attention + epsilon) * norm``. Without a norm the
    attention decides alone.

    In a padded batch row ``b`` keeps ``row_budgets[b]`` of its ``real[b]`` positions, in its last
    slots; the slots before them hold position 0 and mean nothing. Where nothing is cut, nothing
    moves: a budget of K keeps every position, pads included, where it was.
    """
    batch, kv_heads, kv_len = base.shape
    if budget == kv_len:
        return torch.arange(kv_len).expand(batch, kv_heads, kv_len)
    keep = torch.zeros(batch, kv_heads, budget, dtype=torch.int64)
    ratio = exact_share(first_stage_ratio)
    for b in range(batch):
        row = list(range(kv_len)) if real is None else real[b].nonzero()[:, 0].tolist()
        row_budget = budget if row_budgets is None else int(row_budgets[b])
        prefix = max(len(row) - window_size, 0)
        for h in range(kv_heads):
            kept, rest = row[prefix:], row[:prefix]
            scores = base[b, h].float()
            first = row_budget if norm is None else math.floor(ratio * row_budget)
            kept = kept + best(scores.tolist(), rest, max(first - window_size, 0))
            if norm is not None:
                second = (scores + epsilon) * norm[b, h].float()
                left = [i for i in rest if i not in set(kept)]
                kept = kept + best(second.tolist(), left, max(row_budget - len(kept), 0))
            kept = sorted(kept)[max(len(kept) - row_budget, 0) :]
            keep[b, h, budget - row_budget :] = torch.tensor(kept)
    return keep


def compact(key: Tensor, value: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The kept entries of K and V, ``[B, Hkv, budget, D]``, in temporal order."""
    batch, kv_heads, _ = keep.shape
    rows = [(b, h) for b in range(batch) for h in range(kv_heads)]

    def gathered(cache: Tensor) -> Tensor:
        stacked = torch.stack([cache[b, h, keep[b, h]] for b, h in rows])
        return stacked.reshape(batch, kv_heads, keep.shape[2], cache.shape[3])

    return gathered(key), gathered(value)
