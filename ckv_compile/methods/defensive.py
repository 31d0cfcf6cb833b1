"""DefensiveKV (arXiv 2510.13334): the worst case over the window, not its mean."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import ScoreInputs, Scores

KERNEL_SIZE = 5
PROTECTED_MASS = 0.9


def defensive(inputs: ScoreInputs) -> Scores:
    """``max(max_t,h A~[h, t, i], mean_i of it) * ||v_i W_O|| / sum_heads ||v_i W_O||``.

    ``A~`` is a query's attention on the keys before the window, averaged over 5 neighbours and
    scaled back to the mass it had; the maximum is over the group's heads and the window. No key of
    a KV head counts less than the head's mean. The norm, ``config.norm``, is shared out over the KV
    heads at each position.

    Before all others come the entries that are protected, in place of CriticalKV's first stage: of
    each KV head the fewest that carry 0.9 of the window's mean attention (not pooled, mean over
    the group) on the keys before it. Their score is the layer's highest by the formula above, times
    1 plus their mean attention: where the budget holds not even them, the most attended stay.
    That order is our choice, and so is that they come first where heads or layers compete; the
    paper gives all of them the highest score, and no head more than a uniform budget of them.
    """
    prefix = inputs.prefix()  # [1 or B, 1, K]
    worst = inputs.attention_rows("max", kernel_size=KERNEL_SIZE)  # [B, H, K]
    worst = inputs.groups_of(worst).amax(2)
    mean = worst.sum(-1, keepdim=True) / prefix.sum(-1, keepdim=True).clamp(min=1)
    risk = torch.where(prefix, worst.maximum(mean), 0.0)
    norm = inputs.projected_norm()
    tiny = torch.finfo(torch.float32).tiny
    scores = risk * norm / norm.sum(1, keepdim=True).clamp(min=tiny)
    attention = inputs.window_attention(kernel_size=1)
    first = scores.amax((1, 2), keepdim=True).clamp(min=tiny) * (1 + attention)
    return Scores(torch.where(_carriers(attention, PROTECTED_MASS), first, scores))


def _carriers(attention: Tensor, mass: float) -> Tensor:
    """The fewest entries that carry ``mass`` of the sum of ``[B, Hkv, K]``, as bool.

    Of equal ones the later, as everywhere.
    """
    ordered, order = attention.flip(-1).sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    needed = before < mass * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(needed).scatter(-1, order, needed).flip(-1)
