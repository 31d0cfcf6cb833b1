"""DefensiveKV (arXiv 2510.13334): the worst case over the window, not its mean."""

from __future__ import annotations

import torch

from .base import ScoreInputs, Scores

KERNEL_SIZE = 5


def defensive(inputs: ScoreInputs) -> Scores:
    """``max(max_t,h A~[h, t, i], mean_i of it) * ||v_i W_O|| / sum_heads ||v_i W_O||``.

    ``A~`` is a query's attention on the keys before the window, averaged over 5 neighbours and
    scaled back to the mass it had; the maximum is over the group's heads and the window. No key of
    a KV head counts less than the head's mean. The norm, ``config.norm``, is shared out over the KV
    heads at each position.

    The paper first protects the tokens that carry 0.9 of the mean attention. That set has another
    size in every head, and a rank by another score than the rest; the selection has neither, so it
    is left out: all entries are taken by the score above.
    """
    prefix = inputs.prefix()  # [1 or B, 1, K]
    worst = inputs.attention_rows("max", kernel_size=KERNEL_SIZE)  # [B, H, K]
    worst = inputs.groups_of(worst).amax(2)
    mean = worst.sum(-1, keepdim=True) / prefix.sum(-1, keepdim=True).clamp(min=1)
    risk = torch.where(prefix, worst.maximum(mean), 0.0)
    norm = inputs.projected_norm()
    share = norm / norm.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return Scores(risk * share)
