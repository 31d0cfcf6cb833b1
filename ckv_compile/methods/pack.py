"""Several layers cut together, each head to a length of its own, into one packed store."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..budget import exact_share
from ..config import EvictionConfig
from ..kernels.select import best, in_window, sort_keys
from ..sizes import TAIL, number_of
from .allocation import ALLOCATIONS, Shares


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
        preferences: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        """Of each layer ``[B, Hkv, K, *]`` and its scores ``[B, Hkv, K]``; no norms if none asks.

        Args:
            capacity: as long as the budget per head, ``row_budgets`` ``[B]`` those of the rows
                that ``padding`` ``[B, K]`` pads.
            total: of all rows' budgets together what is packed, see ``sized``.
            preferences: ``[B]`` of each layer, for the allocation that weighs layers.

        Returns:
            K and V ``[T, *]``; then for each layer where its heads begin in them, ``[B*Hkv + 1]``
            int32, row by row, and its last tokens apart, ``[B, Hkv, 2, *]`` of K and of V.
        """
        config = self.config
        real = None if padding is None else padding.bool()
        share = exact_share(config.first_stage_ratio)
        scores = config.head_scores
        key, value, starts = torch.ops.ckv_compile.pack(
            list(keys),
            list(values),
            list(bases),
            list(norms),
            torch.sym_min(capacity.shape[0], keys[0].shape[2]),
            number_of(total) * sum(key.shape[1] for key in keys),
            real,
            row_budgets,
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
            layers += [_tail(keys[i], real), _tail(values[i], real)]
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
    real: Tensor,
    allocation: str,
    shares: Shares,
) -> list[Tensor]:
    """Entries that each head of each layer keeps, ``[B, Hkv]`` int64, the window among them.

    Args:
        bases: base scores ``[B, Hkv, K]`` of each layer.
        row_budgets: ``[B]`` entries per head if all had the same.
        real: ``[B, K]`` bool, False at pads.
    """
    window = in_window(real, window_size)
    held = window.sum(-1).minimum(row_budgets)
    extra = ALLOCATIONS[allocation](bases, row_budgets - held, real & ~window, shares)
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
        budgets: ``[B, Hkv]`` entries that each head keeps, at most the real ones of its row.
    """
    positions = torch.arange(base.shape[2], device=base.device)
    kept, real = in_window(real, window_size)[:, None], real[:, None]
    scores = base
    if norm is not None:
        first = (ratio[0] * budgets // ratio[1]).maximum(kept.sum(-1)).minimum(budgets)
        kept = best(sort_keys(base, kept, real, positions), first)
        scores = (base + epsilon) * norm
    return best(sort_keys(scores, kept, real, positions), budgets)


def _tail(cache: Tensor, real: Tensor | None) -> Tensor:
    """The last real entries of each row of ``[B, Hkv, K, D]``, ``[B, Hkv, 2, D]``."""
    if real is None:
        return cache[:, :, -TAIL:].clone()
    columns = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, columns, -1).topk(TAIL, dim=-1).values.flip(-1)  # [B, 2]
    index = last[:, None, :, None].expand(*cache.shape[:2], TAIL, cache.shape[3])
    return cache.gather(2, index)


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
    tail = in_window(real, TAIL)[:, None]
    budgets = head_budgets(bases, row_budgets, window_size, real, allocation, shares)
    key = keys[0].new_empty(entries, keys[0].shape[3])
    value = values[0].new_empty(entries, values[0].shape[3])
    begin = 0
    for i, base in enumerate(bases):
        norm = norms[i] if norms else None
        mask = keep_mask(base, norm, budgets[i], window_size, ratio, epsilon, real) & ~tail
        rows, heads, places = mask.nonzero(as_tuple=True)
        end = begin + len(places)
        key[begin:end] = keys[i][rows, heads, places]
        value[begin:end] = values[i][rows, heads, places]
        begin = end
    if begin != entries:
        raise RuntimeError(f"{allocation} kept {begin} entries of a budget of {entries}")
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
