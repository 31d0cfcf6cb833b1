"""What heads that compete for a budget keep: the allocations, outside of a graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..budget import exact_share
from ..config import EvictionConfig
from ..methods.allocation import Shares
from ..methods.base import Scores
from ..methods.pack import head_budgets, keep_mask
from ..passes.pack import unlike, unpackable
from ..site import AttentionSite
from ..sizes import TAIL


def kept_masks(
    layers: Sequence[Scores], config: EvictionConfig, preferences: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Which entries of a prompt stay in each layer, ``[B, Hkv, K]`` bool.

    The library's own two steps, as ``PackKV`` takes them: each head's budget, and then its best.

    Args:
        layers: the scores of all layers that are cut, in the model's order.
        preferences: what each of them asks for, ``[B]``, where the allocation weighs layers.
    """
    bases = [scores.base for scores in layers]
    batch, _, kv_len = bases[0].shape
    real = torch.ones(batch, kv_len, dtype=torch.bool)
    rows = torch.full((batch,), config.entries(kv_len))
    table = config.head_scores
    flat = None if table is None else tuple(score for row in table for score in row)
    asked = torch.stack(list(preferences), 1) if preferences else None
    window, shares = max(config.window_size, TAIL), Shares(config.safeguard, flat, asked)
    budgets = head_budgets(bases, rows, window, real, config.allocation, shares)
    share = exact_share(config.first_stage_ratio)
    stages = (window, (share.numerator, share.denominator), config.epsilon)
    return [
        keep_mask(
            scores.base, scores.made_norm, budget, *stages, real[:, None].expand_as(scores.base)
        )
        for scores, budget in zip(layers, budgets, strict=True)
    ]


def check_packable(sites: Sequence[AttentionSite]) -> None:
    """Whether every attention can read packed entries.

    Raises:
        ValueError: naming the one that cannot, and why.
    """
    for site in sites:
        if reason := unpackable(site):
            raise ValueError(f"{site.name} takes allocation='uniform' alone: {reason}")
    if reason := unlike(sites):
        raise ValueError(reason)
