"""The oracle: METHODS in eager float32, one head at a time. Obvious, never optimised.

Shapes: ``query [B, H, Q, D]``, ``key``, ``value [B, Hkv, K, D]``, ``weight [E, H*Dv]`` as
``nn.Linear`` keeps it (``in_out=False``) or ``[H*Dv, E]`` as GPT-2's Conv1D does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def window_attention(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    window_size: int,
    kernel_size: int,
    softcap: float | None = None,
) -> Tensor:
    """SnapKV scores ``[B, Hkv, K]`` of the keys before the window; 0 in the window.

    Mean causal attention of the last ``window_size`` queries, max-pooled over the keys before the
    window (and over nothing else), then averaged over the heads of a group (arXiv 2404.14469).
    """
    batch, heads, _, head_dim = query.shape
    kv_heads, kv_len = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    prefix = max(kv_len - window_size, 0)
    scores = torch.zeros(batch, kv_heads, kv_len)
    if prefix == 0:
        return scores
    for b in range(batch):
        for h in range(heads):
            logits = query[b, h, -window_size:].float() @ key[b, h // groups].float().T * scale
            if softcap is not None:
                logits = (logits / softcap).tanh() * softcap
            for t in range(window_size):
                logits[t, kv_len - window_size + t + 1 :] = -math.inf
            attention = logits.softmax(-1).mean(0)[:prefix]
            for i in range(prefix):
                low, high = max(i - kernel_size // 2, 0), i + kernel_size // 2 + 1
                scores[b, h // groups, i] += attention[low:high].max() / groups
    return scores


def projected_norm(value: Tensor, weight: Tensor, in_out: bool, heads: int, norm: str) -> Tensor:
    """``||v_i W_O^h||_1`` or ``_2``, averaged over the query heads of a group: ``[B, Hkv, K]``."""
    batch, kv_heads, kv_len, head_dim = value.shape
    groups = heads // kv_heads
    rows = weight.float() if in_out else weight.float().T  # [H*Dv, E]
    norms = torch.zeros(batch, kv_heads, kv_len)
    for h in range(heads):
        projected = value[:, h // groups].float() @ rows[h * head_dim : (h + 1) * head_dim]
        norms[:, h // groups] += projected.norm(p=1 if norm == "l1" else 2, dim=-1) / groups
    return norms


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
) -> Tensor:
    """Kept positions ``[B, Hkv, budget]``, ascending; two stages (arXiv 2502.03805, section 4).

    The window is kept by construction and counts. Stage 1 fills up to ``floor(ratio * budget)``
    entries by attention; stage 2 the rest by ``(attention + epsilon) * norm``. Without a norm the
    attention decides alone.
    """
    from fractions import Fraction

    batch, kv_heads, kv_len = base.shape
    keep = torch.empty(batch, kv_heads, budget, dtype=torch.int64)
    ratio = Fraction(str(first_stage_ratio))
    for b in range(batch):
        for h in range(kv_heads):
            kept = list(range(max(kv_len - window_size, 0), kv_len))
            rest = list(range(max(kv_len - window_size, 0)))
            scores = base[b, h].float()
            first = budget if norm is None else math.floor(ratio * budget)
            kept += best(scores.tolist(), rest, max(first - window_size, 0))
            if norm is not None:
                second = (scores + epsilon) * norm[b, h].float()
                left = [i for i in rest if i not in set(kept)]
                kept += best(second.tolist(), left, budget - len(kept))
            keep[b, h] = torch.tensor(sorted(kept)[-budget:])
    return keep


def compact(key: Tensor, value: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The kept entries of K and V, ``[B, Hkv, budget, D]``, in temporal order."""
    batch, kv_heads, _ = keep.shape
    rows = [(b, h) for b in range(batch) for h in range(kv_heads)]

    def gathered(cache: Tensor) -> Tensor:
        stacked = torch.stack([cache[b, h, keep[b, h]] for b, h in rows])
        return stacked.reshape(batch, kv_heads, keep.shape[2], cache.shape[3])

    return gathered(key), gathered(value)
