"""CriticalKV as METHODS states it: NumPy, float64, one query head, query and key at a time.

Written without a look at the package, so that a misreading there is not repeated here.
"""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def attention_row(
    query: Array, keys: Array, scale: float, last: int, softcap: float | None
) -> Array:
    """Softmax over keys ``0..last`` of one query ``[D]``; 0 beyond ``last``."""
    logits = [float(np.dot(query, keys[i])) * scale for i in range(last + 1)]
    if softcap is not None:
        logits = [softcap * math.tanh(logit / softcap) for logit in logits]
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    total = math.fsum(weights)
    return np.array([weight / total for weight in weights] + [0.0] * (len(keys) - last - 1))


def window_attention(
    query: Array,
    key: Array,
    scale: float | None,
    window_size: int,
    kernel_size: int,
    softcap: float | None = None,
) -> Array:
    """Base scores ``[B, Hkv, K]``: mean of the window's attention, max over the neighbours before
    the window, mean over the group. What lies in the window has no score: 0."""
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    groups, prefix = heads // kv_heads, kv_len - window_size
    scale = head_dim**-0.5 if scale is None else scale
    scores = np.zeros((batch, kv_heads, kv_len))
    if prefix <= 0:
        return scores
    for b in range(batch):
        for h in range(heads):
            mean = np.zeros(kv_len)
            for t in range(1, window_size + 1):
                row = attention_row(
                    query[b, h, q_len - t].astype(np.float64),
                    key[b, h // groups].astype(np.float64),
                    scale,
                    kv_len - t,
                    softcap,
                )
                mean += row / window_size
            for i in range(prefix):
                near = [j for j in range(prefix) if abs(i - j) <= (kernel_size - 1) // 2]
                scores[b, h // groups, i] += max(mean[j] for j in near) / groups
    return scores


def projected_norm(value: Array, weight: Array, in_out: bool, heads: int, norm: str) -> Array:
    """``||v_i W_O^h||_1`` or ``_2``, or ``||v_i||_1`` (value); mean over the group, [B, Hkv, K]."""
    batch, kv_heads, kv_len, head_dim = value.shape
    groups = heads // kv_heads
    norms = np.zeros((batch, kv_heads, kv_len))
    for b in range(batch):
        for h in range(heads):
            columns = range(h * head_dim, (h + 1) * head_dim)
            slices = [weight[c] if in_out else weight[:, c] for c in columns]
            per_head = np.array(slices).astype(np.float64)  # [Dv, E]
            for i in range(kv_len):
                alone = value[b, h // groups, i].astype(np.float64)
                projected = alone if norm == "value" else alone @ per_head
                if norm == "l2":
                    size = math.sqrt(math.fsum(x * x for x in projected))
                else:
                    size = math.fsum(abs(x) for x in projected)
                norms[b, h // groups, i] += size / groups
    return norms


def stage_two_scores(base: Array, norm: Array, epsilon: float) -> Array:
    """``(s_i + eps) * ||v_i W_O||`` in the dtype of the scores, so that float32 ties stay ties."""
    return (base + base.dtype.type(epsilon)) * norm


def select_head(
    base: Array,
    norm: Array | None,
    budget: int,
    window_size: int,
    first_stage_ratio: float,
    epsilon: float,
) -> list[int]:
    """Kept positions of one head, ascending, from scores ``[K]``."""
    kv_len = len(base)
    kept = [i for i in range(kv_len) if i >= kv_len - window_size]
    open_ = [i for i in range(kv_len) if i < kv_len - window_size]

    def take_best(scores: Array) -> None:
        winner = open_[0]
        for i in open_:
            if scores[i] >= scores[winner]:  # of equals the later
                winner = i
        open_.remove(winner)
        kept.append(winner)

    first = budget if norm is None else int(Decimal(str(first_stage_ratio)) * budget)
    while len(kept) < first:
        take_best(base)
    if norm is not None:
        second = stage_two_scores(base, norm, epsilon)
        while len(kept) < budget:
            take_best(second)
    # A budget below the window leaves its most recent part.
    return sorted(kept)[-budget:]


def select(
    base: Array,
    norm: Array | None,
    budget: int,
    window_size: int,
    first_stage_ratio: float,
    epsilon: float,
) -> NDArray[np.int64]:
    """``[B, Hkv, budget]``, every head on its own."""
    rows = [
        [
            select_head(
                base[b, h],
                None if norm is None else norm[b, h],
                budget,
                window_size,
                first_stage_ratio,
                epsilon,
            )
            for h in range(base.shape[1])
        ]
        for b in range(base.shape[0])
    ]
    return np.array(rows, dtype=np.int64).reshape(*base.shape[:2], budget)


def kept_positions(
    query: Array,
    key: Array,
    value: Array,
    weight: Array,
    *,
    budget: int,
    window_size: int,
    kernel_size: int,
    first_stage_ratio: float,
    epsilon: float,
    norm: str,
    in_out: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> NDArray[np.int64]:
    """The whole algorithm: what of a prompt stays, ``[B, Hkv, budget]``."""
    base = window_attention(query, key, scale, window_size, kernel_size, softcap)
    norms = projected_norm(value, weight, in_out, query.shape[1], norm)
    return select(base, norms, budget, window_size, first_stage_ratio, epsilon)
