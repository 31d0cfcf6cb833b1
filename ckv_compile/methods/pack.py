"""Several layers cut together, each head to a length of its own, into one packed store."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..budget import exact_share
from ..config import EvictionConfig
from ..kernels.select import best, in_window, sort_keys
from ..sizes import TAIL, number_of
from .allocation import ALLOCATIONS, Shares
from .base import real_columns


class PackKV(nn.Module):
    """``ckv_pack_i`` in the graph: what a prefill leaves of a layer, or of all, in packed form."""

    from_config = False  # its budget is an input

    def __init__(self, config: EvictionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
        bases: tuple[Tensor, ...],
        norms: tuple[Tensor, ...],
        capacity: Tensor,
        total: Tensor,
        padding: Tensor | None = None,
        row_budgets: Tensor | None = None,
        gap: Tensor | None = None,
        before: tuple[tuple[Tensor, ...], ...] = ((), (), (), (), ()),
        preferences: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        """Of each layer ``[B, Hkv, K, *]`` and its scores ``[B, Hkv, K]``; no norms if none asks.

        Args:
            capacity: as long as the budget per head, ``row_budgets`` ``[B]`` those of the rows,
                where they differ. ``padding`` ``[B, K]`` is false at pads; with ``gap`` its first
                columns, as many as that counts, are of tokens that an earlier cut has taken.
            total: of all rows' budgets together what is packed, see ``sized``.
            before: of each layer what an earlier cut has packed, which stands before K and V: keys
                and values ``[T, *]``, where the heads begin, and the scores and norms ``[T]``.
            preferences: ``[B]`` of each layer, for the allocation that weighs layers.

        Returns:
            K and V ``[T, *]``; then for each layer where its heads begin in them, ``[B*Hkv + 1]``
            int32, row by row, and its last tokens apart, ``[B, Hkv, 2, *]`` of K and of V.
        """
        config = self.config
        real = real_columns(padding, gap, keys[0].shape[2])
        share = exact_share(config.first_stage_ratio)
        scores = config.head_scores
        # What is packed already may be more than the tail that is read with it.
        most = capacity.shape[0]
        budget = most if before[0] else torch.sym_min(most, keys[0].shape[2])
        key, value, starts = torch.ops.ckv_compile.pack(
            list(keys),
            list(values),
            list(bases),
            list(norms),
            budget,
            number_of(total) * sum(key.shape[1] for key in keys),
            real,
            row_budgets,
            *(list(part) for part in before),
            config.window_size,
            [share.numerator, share.denominator],
            config.epsilon,
            config.allocation,
            config.safeguard,
            None if scores is None else [score for row in scores for score in row],
            torch.stack(preferences, 1) if preferences else None,
        )
        heads = [key.shape[0] * key.shape[1] for key in keys]
        ends = [sum(heads[: i + 1]) for i in range(len(heads))]
        layers: list[Tensor] = []
        for i, (n, end) in enumerate(zip(heads, ends, strict=True)):
            # Cloned: a view of it would keep the lengths of all layers.
            layers.append(starts[end - n : end + 1].clone())
            layers += [tail_of(keys[i], real), tail_of(values[i], real)]
        return key, value, *layers

    def extra_repr(self) -> str:
        """All that the body depends on; the compile cache is keyed by it."""
        config = self.config
        return (
            f"allocation={config.allocation}, safeguard={config.safeguard}, "
            f"head_scores={config.head_scores}, window_size={config.window_size}, "
            f"first_stage_ratio={config.first_stage_ratio}, epsilon={config.epsilon}"
        )


def head_budgets(
    bases: Sequence[Tensor],
    row_budgets: Tensor,
    window_size: int,
    real: Tensor | Sequence[Tensor],
    allocation: str,
    shares: Shares,
) -> list[Tensor]:
    """Entries that each head of each layer keeps, ``[B, Hkv]`` int64, the window among them.

    Args:
        bases: base scores ``[B, Hkv, K]`` of each layer.
        row_budgets: ``[B]`` entries per head if all had the same.
        real: ``[B, K]`` bool, False at pads; or ``[B, Hkv, K]`` of each layer, whose heads hold
            different entries.
    """
    if isinstance(real, Tensor):
        real = [real[:, None].expand(base.shape) for base in bases]
    # A head that an earlier cut left with less than a window says how long it is.
    least = torch.stack([own.sum(-1).amin(-1) for own in real]).amin(0)
    held = least.clamp(max=window_size).minimum(row_budgets)
    candidates = [own & ~in_window(own, held[:, None, None]) for own in real]
    extra = ALLOCATIONS[allocation](bases, row_budgets - held, candidates, shares)
    return [layer + held[:, None] for layer in extra]


def keep_mask(
    base: Tensor,
    norm: Tensor | None,
    budgets: Tensor,
    window_size: int,
    ratio: Sequence[int],
    epsilon: float,
    real: Tensor,
) -> Tensor:
    """What stays, ``[B, Hkv, K]`` bool: :func:`ckv_compile.kernels.select.select` by heads.

    Args:
        budgets: ``[B, Hkv]`` entries that each head keeps, at most its real ones.
        real: ``[B, Hkv, K]`` bool.
    """
    positions = torch.arange(base.shape[2], device=base.device)
    kept = in_window(real, window_size)
    scores = base
    if norm is not None:
        first = (ratio[0] * budgets // ratio[1]).maximum(kept.sum(-1)).minimum(budgets)
        kept = best(sort_keys(base, kept, real, positions), first)
        scores = (base + epsilon) * norm
    return best(sort_keys(scores, kept, real, positions), budgets)


def tail_of(cache: Tensor, real: Tensor | None) -> Tensor:
    """The last real entries of each row of ``[B, Hkv, K, D]``, ``[B, Hkv, 2, D]``."""
    if real is None:
        return cache[:, :, -TAIL:].clone()
    columns = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, columns, -1).topk(TAIL, dim=-1).values.flip(-1)  # [B, 2]
    index = last[:, None, :, None].expand(*cache.shape[:2], TAIL, cache.shape[3])
    return cache.gather(2, index)


@dataclasses.dataclass(frozen=True)
class _Columns:
    """Where the packed entries of one layer stand in a table ``[B, Hkv, P]`` of all of them.

    They end where the tail begins, so that a column of the tail is the same token in every head.
    """

    at: Tensor  # [B, Hkv, P] int64, places in the store; 0 where there is no entry
    real: Tensor  # [B, Hkv, P] bool

    def beside(self, packed: Tensor, tail: Tensor) -> Tensor:
        """``packed`` ``[T]`` before ``tail`` ``[B, Hkv, t]``: ``[B, Hkv, P + t]``."""
        before = tail.new_zeros(self.at.shape)
        before[self.real] = packed[self.at[self.real]]
        return torch.cat([before, tail], dim=-1)


def _columns(starts: Sequence[Tensor], batch: int) -> list[_Columns]:
    """Of each layer, whose heads begin at ``starts`` ``[B*Hkv + 1]``."""
    lengths = [each.diff().view(batch, -1, 1) for each in starts]
    width = max((int(each.max()) for each in lengths), default=0)
    columns = []
    for begin, length in zip(starts, lengths, strict=True):
        column = torch.arange(width, device=begin.device) - (width - length)
        real = column >= 0
        at = (begin[:-1].view(batch, -1, 1) + column).long().masked_fill(~real, 0)
        columns.append(_Columns(at, real))
    return columns


def _copied(
    to: Tensor,
    mask: Tensor,
    tail: Tensor,
    packed: Sequence[Tensor],
    columns: Sequence[_Columns],
    layer: int,
) -> None:
    """Fill ``to`` ``[N, D]`` with the N entries at ``mask`` ``[B, Hkv, P + t]``, head by head."""
    rows, heads, places = mask.nonzero(as_tuple=True)
    if not columns:
        to.copy_(tail[rows, heads, places])
        return
    at = columns[layer].at
    old, new = places < at.shape[2], places >= at.shape[2]
    to[old] = packed[layer][at[rows[old], heads[old], places[old]]]
    to[new] = tail[rows[new], heads[new], places[new] - at.shape[2]]


# Opaque to the compiler: how many entries a head keeps is known only when it runs, and what is
# handed on must have sizes that do not depend on it. On a GPU it waits for the device, once.
@torch.library.custom_op("ckv_compile::pack", mutates_args=())
def _pack(
    keys: list[Tensor],
    values: list[Tensor],
    bases: list[Tensor],
    norms: list[Tensor],
    budget: int,
    entries: int,
    real: Tensor | None,
    row_budgets: Tensor | None,
    packed_keys: list[Tensor],
    packed_values: list[Tensor],
    starts: list[Tensor],
    packed_bases: list[Tensor],
    packed_norms: list[Tensor],
    window_size: int,
    ratio: list[int],
    epsilon: float,
    allocation: str,
    safeguard: float,
    head_scores: list[float] | None,
    preferences: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, kv_len, _ = keys[0].shape
    if real is None:
        real = torch.ones(1, 1, dtype=torch.bool, device=keys[0].device).expand(batch, kv_len)
    if row_budgets is None:
        row_budgets = real.new_full((batch,), budget, dtype=torch.int64)
    measured = None if head_scores is None else tuple(head_scores)
    shares = Shares(safeguard, measured, preferences)
    window_size = max(window_size, TAIL)
    reals = [real[:, None].expand(base.shape) for base in bases]
    columns, bases, norms = _columns(starts, batch), list(bases), list(norms)
    for i, layer in enumerate(columns):
        bases[i] = layer.beside(packed_bases[i], bases[i])
        reals[i] = torch.cat([layer.real, reals[i]], dim=-1)
        if norms:
            norms[i] = layer.beside(packed_norms[i], norms[i])
    budgets = head_budgets(bases, row_budgets, window_size, reals, allocation, shares)
    counts = [int((layer - TAIL).sum()) for layer in budgets]
    if sum(counts) != entries:
        raise RuntimeError(
            f"{allocation} kept {sum(counts)} entries of a budget of {entries}; heads that another "
            f"allocation has cut may not hold what this one wants"
        )
    key = keys[0].new_empty(entries, keys[0].shape[3])
    value = values[0].new_empty(entries, values[0].shape[3])
    own_keys, own_values = key.split(counts), value.split(counts)
    for i, base in enumerate(bases):
        norm, own = norms[i] if norms else None, reals[i]
        mask = keep_mask(base, norm, budgets[i], window_size, ratio, epsilon, own)
        mask &= ~in_window(own, TAIL)
        _copied(own_keys[i], mask, keys[i], packed_keys, columns, i)
        _copied(own_values[i], mask, values[i], packed_values, columns, i)
    lengths = (torch.cat([layer.flatten() for layer in budgets]) - TAIL).cumsum(0)
    return key, value, torch.cat([lengths.new_zeros(1), lengths]).int()


@_pack.register_fake
def _(
    keys: list[Tensor],
    values: list[Tensor],
    bases: list[Tensor],
    norms: list[Tensor],
    budget: int,
    entries: int,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = sum(key.shape[0] * key.shape[1] for key in keys)
    return (
        keys[0].new_empty(entries, keys[0].shape[3]),
        values[0].new_empty(entries, values[0].shape[3]),
        keys[0].new_empty(heads + 1, dtype=torch.int32),
    )
