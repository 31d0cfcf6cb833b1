"""How a budget is shared out over the heads and layers of a model: pure integer arithmetic.

Every allocation hands out exactly what ``uniform`` would: the entries beyond the observation window
add up to ``extra`` times the number of heads, in each row of the batch. The window is every head's.

Heads that were cut before hold different entries. None is then given more than it holds; what would
be goes to others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from ..budget import exact_share
from ..kernels.select import best, sort_keys

# PyramidKV's ratio of the mean to the last layer's budget; HeadKV's share of the common pool.
PYRAMID_BETA = 20
HEADKV_BETA = Fraction(101, 100)


@dataclasses.dataclass(frozen=True)
class Shares:
    """What some allocations want to know: options of :class:`ckv_compile.EvictionConfig`.

    ``head_scores`` are those of all layers, one after the other; ``preferences`` ``[B, L]`` float32
    what each layer asks for.
    """

    safeguard: float = 0.2
    head_scores: tuple[float, ...] | None = None
    preferences: Tensor | None = None


# Scores [B, Hkv, K] and candidates [B, Hkv, K] of each layer, extra [B] -> [B, Hkv] int64 of each.
Allocation = Callable[[Sequence[Tensor], Tensor, Sequence[Tensor], Shares], list[Tensor]]


def uniform(
    scores: Sequence[Tensor], extra: Tensor, candidates: Sequence[Tensor], shares: Shares
) -> list[Tensor]:
    """``extra`` entries for every head."""
    each = [extra[:, None].expand(-1, layer.shape[1]) for layer in scores]
    return [_capped(one, own.sum(-1)) for one, own in zip(each, candidates, strict=True)]


def adakv(
    scores: Sequence[Tensor], extra: Tensor, candidates: Sequence[Tensor], shares: Shares
) -> list[Tensor]:
    """Within a layer, the heads whose entries score best get most (Ada-KV, arXiv 2407.11550).

    A head's share is the number of its entries among the layer's best, mixed with a floor:
    ``(1 - safeguard) * count + safeguard * extra``, rounded by the largest remainder.
    """
    floor = exact_share(shares.safeguard)
    budgets = []
    for layer, own in zip(scores, candidates, strict=True):
        count = _counts([layer], extra, [own])
        quota = (floor.denominator - floor.numerator) * count + floor.numerator * extra[:, None]
        each = _apportioned(quota, floor.denominator, extra * layer.shape[1])
        budgets.append(_capped(each, own.sum(-1)))
    return budgets


def global_(
    scores: Sequence[Tensor], extra: Tensor, candidates: Sequence[Tensor], shares: Shares
) -> list[Tensor]:
    """One choice over all heads of all layers (LaProx, arXiv 2605.07234, section 4).

    Scores are divided by their sum over the layer before. A head's budget is the number of its
    entries among the best.
    """
    normed = []
    for layer, own in zip(scores, candidates, strict=True):
        seen = layer.masked_fill(~own, 0.0)
        # In float64: shares that are equal stay so, in whatever order a device adds.
        total = seen.sum((1, 2), keepdim=True, dtype=torch.float64).float()
        normed.append(seen / total.clamp(min=torch.finfo(torch.float32).tiny))
    heads = [layer.shape[1] for layer in scores]
    return list(_counts(normed, extra, candidates).split(heads, dim=1))


def pyramid(
    scores: Sequence[Tensor], extra: Tensor, candidates: Sequence[Tensor], shares: Shares
) -> list[Tensor]:
    """Fewer entries from layer to layer, linearly (PyramidKV, arXiv 2406.02069).

    The last layer gets ``extra / 20``, the first as much more than ``extra``; where that is more
    than there is, all of it, and the last one what then remains of twice ``extra``.
    """
    layers, heads = len(scores), scores[0].shape[1]
    held = torch.stack([own.sum(-1) for own in candidates], 1)  # [B, L, Hkv]
    available = held.amax(-1)
    if layers == 1:
        return uniform(scores, extra, candidates, shares)
    # All times 20 (L - 1), so that nothing is rounded before the remainders are compared.
    last = extra
    first = 2 * PYRAMID_BETA * extra - last
    first = first.minimum(PYRAMID_BETA * available[:, 0])
    last = 2 * PYRAMID_BETA * extra - first
    steps = torch.arange(layers, device=extra.device)
    quota = first[:, None] * (layers - 1) - steps * (first - last)[:, None]  # [B, L]
    each = _apportioned(quota, PYRAMID_BETA * (layers - 1), extra * layers)
    each = _capped(each, available).repeat_interleave(heads, 1)
    return list(_capped(each, held.flatten(1)).split(heads, dim=1))


def headkv(
    scores: Sequence[Tensor], extra: Tensor, candidates: Sequence[Tensor], shares: Shares
) -> list[Tensor]:
    """Fixed shares, measured beforehand, of a pool; the rest is a floor (HeadKV, arXiv 2410.19258).

    Of the ``extra`` entries of each head ``1 / 1.01`` go into the pool. Shares are read to one part
    in a million of the model's.
    """
    heads = [layer.shape[1] for layer in scores]
    given = shares.head_scores or ()
    if len(given) != sum(heads):
        raise ValueError(f"head_scores has {len(given)} scores; this model has {heads} KV heads")
    flat = torch.tensor(given, dtype=torch.float64)
    parts = (flat / flat.sum() * 10**6).round().long().to(extra.device)
    whole, number = parts.sum(), sum(heads)
    beta = HEADKV_BETA
    quota = (beta.numerator - beta.denominator) * whole + parts * number * beta.denominator
    quota = extra[:, None] * quota
    each = _apportioned(quota, beta.numerator * whole, extra * number)
    held = torch.cat([own.sum(-1) for own in candidates], 1)
    return list(_capped(each, held).split(heads, dim=1))


def cake(
    scores: Sequence[Tensor], extra: Tensor, candidates: Sequence[Tensor], shares: Shares
) -> list[Tensor]:
    """Layers share a pool by what they ask for (CAKE, arXiv 2503.12491), their heads alike.

    Preferences are read to one part in a million of a row's; a row without any is shared out
    evenly. What a layer has no entries for goes to those that got most.
    """
    layers = len(scores)
    assert shares.preferences is not None
    asked = shares.preferences.double().nan_to_num(nan=0.0, posinf=0.0)
    asked = asked.masked_fill(asked.sum(-1, keepdim=True) == 0, 1.0)
    parts = (asked / asked.sum(-1, keepdim=True) * 10**6).round().long()  # [B, L]
    quota = extra[:, None] * layers * parts
    each = _apportioned(quota, parts.sum(-1, keepdim=True), extra * layers)
    # Heads of one layer hold alike: what was cut by this allocation is not cut again.
    each = _capped(each, torch.stack([own[:, 0].sum(-1) for own in candidates], 1))
    return [each[:, i, None].expand(-1, layer.shape[1]) for i, layer in enumerate(scores)]


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": uniform,
    "adakv": adakv,
    "global": global_,
    "pyramid": pyramid,
    "headkv": headkv,
    "cake": cake,
}


def _counts(scores: Sequence[Tensor], extra: Tensor, candidates: Sequence[Tensor]) -> Tensor:
    """How many of the best ``extra * heads`` candidates of a row each head has, ``[B, heads]``.

    Of equal scores the later position comes first, then the later head.
    """
    together = torch.cat(list(scores), dim=1).mT  # [B, K, heads]
    batch, kv_len, heads = together.shape
    flat = together.reshape(batch, -1)
    order = torch.arange(kv_len * heads, device=flat.device)
    real = torch.cat(list(candidates), dim=1).mT.reshape(batch, -1)
    keys = sort_keys(flat, torch.zeros_like(real), real, order)
    chosen = best(keys, extra * heads)
    return chosen.view(batch, kv_len, heads).sum(1)


def _apportioned(quota: Tensor, denominator: Tensor | int, total: Tensor) -> Tensor:
    """Whole numbers near ``quota / denominator`` ``[B, N]`` whose sum is ``total`` ``[B]``.

    By the largest remainder; of equal remainders the first.
    """
    whole, rest = quota // denominator, quota % denominator
    left = total - whole.sum(-1)
    rank = rest.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return whole + (rank < left[:, None])


def _capped(budgets: Tensor, most: Tensor) -> Tensor:
    """``budgets``, at most ``most``, both ``[B, N]``; the excess goes to the largest others."""
    held = budgets.minimum(most)
    excess = (budgets - held).sum(-1, keepdim=True)
    order = held.argsort(dim=-1, descending=True, stable=True)
    room = (most - held).gather(-1, order)
    given = (excess - (room.cumsum(-1) - room)).clamp(min=0).minimum(room)
    return held.scatter_add(-1, order, given)
