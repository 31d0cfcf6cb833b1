"""The oracle of heads that keep different numbers of entries: Python numbers, one head at a time.

Shapes as in :mod:`ckv_compile.kernels.reference`; a list has one item for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ..budget import exact_share
from . import reference


def window_and_prefix(real: Tensor, window_size: int) -> tuple[list[int], list[int]]:
    """The observation window of one row, and the positions before it; ``real`` is ``[K]``."""
    row = real.nonzero()[:, 0].tolist()
    prefix = max(len(row) - window_size, 0)
    return row[prefix:], row[:prefix]


def head_budgets(
    bases: Sequence[Tensor],
    row_budgets: Tensor,
    window_size: int,
    real: Tensor | Sequence[Tensor],
    allocation: str,
    safeguard: float = 0.2,
    head_scores: Sequence[float] = (),
    preferences: Tensor | None = None,
) -> list[Tensor]:
    """Entries that each head of each layer keeps, ``[B, Hkv]``; see METHODS in the docs.

    ``real`` is ``[B, K]``, or ``[B, Hkv, K]`` of each layer where heads hold different entries.
    """
    budgets = [torch.zeros(base.shape[:2], dtype=torch.int64) for base in bases]
    slots = [(i, h) for i, base in enumerate(bases) for h in range(base.shape[1])]
    for b, budget in enumerate(row_budgets.tolist()):
        own = {(i, h): real[b] if isinstance(real, Tensor) else real[i][b, h] for i, h in slots}
        held = min(window_size, budget, *(int(row.sum()) for row in own.values()))
        prefixes = {slot: window_and_prefix(row, held)[1] for slot, row in own.items()}
        extra, most = budget - held, {slot: len(prefix) for slot, prefix in prefixes.items()}
        scores = {(i, h): {p: float(bases[i][b, h, p]) for p in prefixes[i, h]} for i, h in slots}
        shares: dict[Any, int] = {}
        if allocation == "uniform":
            for i in range(len(bases)):
                shares |= capped(dict.fromkeys([s for s in slots if s[0] == i], extra), most)
        elif allocation == "adakv":
            for i in range(len(bases)):
                mine = [slot for slot in slots if slot[0] == i]
                count = _counts({s: scores[s] for s in mine}, extra * len(mine))
                floor = Fraction(exact_share(safeguard))
                quota = {s: (1 - floor) * count[s] + floor * extra for s in mine}
                shares |= capped(apportioned(quota, extra * len(mine)), most)
        elif allocation == "global":
            for i in range(len(bases)):
                mine = [slot for slot in slots if slot[0] == i]
                total = torch.cat([bases[i][b, h, prefixes[i, h]] for i, h in mine]).double().sum()
                total = total.float().clamp(min=torch.finfo(torch.float32).tiny)
                for h in range(bases[i].shape[1]):
                    normed = bases[i][b, h] / total
                    scores[i, h] = {p: float(normed[p]) for p in prefixes[i, h]}
            shares = _counts(scores, extra * len(slots))
        elif allocation == "pyramid":
            layers = range(len(bases))
            room = [max(n for (i, _), n in most.items() if i == layer) for layer in layers]
            each = pyramid(extra, room)
            shares = capped({(i, h): each[i] for i, h in slots}, most)
        elif allocation == "cake":
            assert preferences is not None
            each = cake(preferences[b].tolist(), extra, max(most.values()))
            shares = {(i, h): each[i] for i, h in slots}
        else:
            total = sum(Fraction(score) for score in head_scores)
            parts = [round(Fraction(score) / total * 10**6) for score in head_scores]
            pool = Fraction(100, 101) * extra * len(slots)
            floor = Fraction(extra, 101)
            whole = sum(parts)
            quota = {s: floor + pool * part / whole for s, part in zip(slots, parts, strict=True)}
            shares = capped(apportioned(quota, extra * len(slots)), most)
        for i, h in slots:
            budgets[i][b, h] = held + shares[i, h]
    return budgets


def pyramid(extra: int, most: list[int]) -> list[int]:
    """Entries beyond the window, from layer to layer (arXiv 2406.02069)."""
    layers = len(most)
    if layers == 1:
        return [extra]
    last = Fraction(extra, 20)
    first = 2 * extra - last
    if first > most[0]:
        first = Fraction(most[0])
        last = 2 * extra - first
    quota = {i: first - i * (first - last) / (layers - 1) for i in range(layers)}
    each = capped(apportioned(quota, extra * layers), dict(enumerate(most)))
    return [each[i] for i in range(layers)]


def cake(preferences: Sequence[float], extra: int, most: int) -> list[int]:
    """Entries beyond the window of each layer, by what it asks for (arXiv 2503.12491)."""
    asked = [Fraction(one) for one in preferences]
    asked = asked if sum(asked) else [Fraction(1) for _ in asked]
    parts = [round(one / sum(asked) * 10**6) for one in asked]
    pool = extra * len(parts)
    quota = {i: Fraction(pool * part, sum(parts)) for i, part in enumerate(parts)}
    each = capped(apportioned(quota, pool), dict.fromkeys(quota, most))
    return [each[i] for i in range(len(parts))]


def layer_preference(
    query: Tensor, key: Tensor, scale: float | None, window_size: int, real: Tensor | None = None
) -> Tensor:
    """CAKE's ``H^(1/1.6) * V^(1/0.6)`` of each row, ``[B]``, in float64 (arXiv 2503.12491).

    Of the attention ``A`` of the row's last ``window_size`` queries, all heads, on the keys before
    the window: ``H`` is the sum of ``-A log A``, ``V`` the sum of the variances among queries. The
    paper leaves open which keys count and how heads are combined: these are our choices.
    """
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    preferences = torch.zeros(batch, dtype=torch.float64)
    for b in range(batch):
        row = torch.arange(kv_len) if real is None else real[b].nonzero()[:, 0]
        prefix = len(row) - window_size
        asking = [t for t in range(len(row)) if row[t] >= kv_len - q_len][-window_size:]
        if prefix <= 0 or not asking:
            continue
        entropy = variance = 0.0
        for h in range(heads):
            keys = key[b, h // (heads // kv_heads), row].double()
            rows = []
            for t in asking:
                logits = keys[: t + 1] @ query[b, h, row[t] - (kv_len - q_len)].double() * scale
                rows.append(logits.softmax(-1)[:prefix].tolist())
            entropy -= sum(a * math.log(a) for attention in rows for a in attention if a > 0)
            for column in zip(*rows, strict=True):
                mean = sum(column) / len(column)
                variance += sum((a - mean) ** 2 for a in column) / len(column)
        preferences[b] = entropy ** (1 / 1.6) * variance ** (1 / 0.6)
    return preferences


def apportioned(quota: dict[Any, Any], total: int) -> dict[Any, int]:
    """By the largest remainder; of equal remainders the first."""
    whole = {slot: math.floor(q) for slot, q in quota.items()}
    order = sorted(quota, key=lambda slot: whole[slot] - quota[slot])
    for slot in order[: total - sum(whole.values())]:
        whole[slot] += 1
    return whole


def capped(budgets: dict[Any, int], most: dict[Any, int]) -> dict[Any, int]:
    """What is above ``most`` of a slot goes to the largest of the others."""
    held = {slot: min(budget, most[slot]) for slot, budget in budgets.items()}
    excess = sum(budgets.values()) - sum(held.values())
    for slot in sorted(held, key=lambda slot: -held[slot]):
        given = min(excess, most[slot] - held[slot])
        held[slot] += given
        excess -= given
    return held


def _counts(scores: dict[Any, Any], count: int) -> dict[Any, int]:
    entries = [(score, p, slot) for slot, row in scores.items() for p, score in row.items()]
    chosen = [slot for _, _, slot in sorted(entries, reverse=True)[:count]]
    return {slot: chosen.count(slot) for slot in scores}


def pack(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    bases: Sequence[Tensor],
    norms: Sequence[Tensor],
    budgets: Sequence[Tensor],
    window_size: int,
    first_stage_ratio: float,
    epsilon: float,
    real: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept entries of all layers, rows and heads behind each other, and where each begins."""
    key, value, starts = [], [], [0]
    for i, base in enumerate(bases):
        for b in range(base.shape[0]):
            for h in range(base.shape[1]):
                one = (slice(b, b + 1), slice(h, h + 1))
                budget = int(budgets[i][b, h])
                kept = reference.select(
                    base[one],
                    norms[i][one] if norms else None,
                    budget,
                    window_size,
                    first_stage_ratio,
                    epsilon,
                    real[b : b + 1],
                    torch.tensor([budget]),
                )[0, 0]
                if budget == base.shape[2]:
                    kept = torch.arange(budget)
                key.append(keys[i][b, h, kept])
                value.append(values[i][b, h, kept])
                starts.append(starts[-1] + budget)
    return torch.cat(key), torch.cat(value), torch.tensor(starts, dtype=torch.int32)


def ragged_attention(
    query: Tensor,
    packed_key: Tensor,
    packed_value: Tensor,
    cu_kv_lens: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of each query over its head's packed entries and what it sees of the tail."""
    batch, heads, q_len, head_dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    out = torch.zeros(batch, heads, q_len, value.shape[3])
    if mask is not None:
        mask = mask.expand(batch, heads, q_len, length)
    for b in range(batch):
        for h in range(heads):
            head = b * kv_heads + h // (heads // kv_heads)
            start, end = int(cu_kv_lens[head]), int(cu_kv_lens[head + 1])
            k = torch.cat([packed_key[start:end], key[b, h // (heads // kv_heads)]]).float()
            v = torch.cat([packed_value[start:end], value[b, h // (heads // kv_heads)]]).float()
            for t in range(q_len):
                logits = query[b, h, t].float() @ k.T * scale
                seen = torch.zeros(length)
                if mask is not None and mask.dtype == torch.bool:
                    seen = seen.masked_fill(~mask[b, h, t], -math.inf)
                elif mask is not None:
                    seen = mask[b, h, t].float()
                if is_causal:
                    seen = seen.masked_fill(torch.arange(length) > t, -math.inf)
                logits[end - start :] += seen
                if bool((logits > -math.inf).any()):
                    out[b, h, t] = logits.softmax(-1) @ v
    return out.to(query.dtype)
