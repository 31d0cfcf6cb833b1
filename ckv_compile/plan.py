"""What one call is to keep: the budget, counted on the tokens that it and its rows have seen."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .budget import CacheBytes
from .config import EvictionConfig
from .sizes import TAIL, sized, varies


@dataclasses.dataclass(frozen=True)
class Plan:
    """The budget of a call that fills a cache, as inputs of the compiled graph.

    ``capacity`` is empty and as long as the budget for ``tokens`` and all before them;
    ``row_budgets`` ``[B]`` int64 are those of the rows that the mask ``padding`` pads, both None
    without padding. ``gap`` is None for a fresh prefill; for what follows one it counts the
    tokens that are evicted, and only the columns of ``padding`` from there on are of the cache.
    ``strict``: a cache of other tokens than these must stay whole, for ours will count these.
    ``total`` counts what all rows keep per head, but for the tail, where heads are to keep
    different numbers of entries; None where all keep the same.

    Not read by the graph: ``seen`` tokens when it has run, ``real`` ``[B, K]`` entries then.
    """

    capacity: Tensor
    tokens: Tensor
    padding: Tensor | None
    row_budgets: Tensor | None
    gap: Tensor | None
    strict: bool
    seen: int
    real: Tensor | None
    total: Tensor | None = None
    # [B, K] int8, the kinds of the entries' tokens where policies choose by them.
    kinds: Tensor | None = None

    def mark(self, key: Tensor | None = None) -> Tensor:
        """Bring the budget into the graph that is being traced; elsewhere nothing happens.

        Args:
            key: of the cache layer that speaks, once it holds the call's tokens.

        Returns:
            Where the entries that stay stood, see the marker.
        """
        return torch.ops.ckv_compile.capacity(
            self.capacity, self.tokens, self.padding, self.row_budgets, self.gap, self.strict, key
        )


def plan_for(
    config: EvictionConfig,
    tokens: Tensor,
    *,
    held: int = 0,
    gap: Tensor | None = None,
    seen_mask: Tensor | None = None,
    held_mask: Tensor | None = None,
    before: int = 0,
    packed: list[int] | None = None,
    size: CacheBytes | None = None,
    strict: bool = True,
) -> Plan:
    """The plan for ``tokens`` ``[B, Q]`` behind ``held`` entries, which ``before`` tokens left.

    Args:
        gap: of the cache that is cut again, see :class:`Plan`.
        seen_mask: ``[B, before + Q]``, 0 at pads; None without padding.
        held_mask: the same mask, made to fit what the cache holds: its last ``held + Q`` columns.
            None beside packed entries where it hides nothing there.
        packed: what each row holds beside, per head, on average.
        size: of the caches, for a budget in bytes.
        strict: see :class:`Plan`.
    """
    seen, kv_len = before + tokens.shape[1], held + tokens.shape[1]
    beside = packed or [0] * tokens.shape[0]
    length = min(config.entries(seen, size), kv_len + max(beside))
    row_budgets = real = None
    if seen_mask is not None:
        entries = [kv_len] * tokens.shape[0]
        if held_mask is not None:
            real = held_mask[:, -kv_len:].bool()
            entries = real.sum(-1).tolist()
        entries = [left + more for left, more in zip(entries, beside, strict=True)]
        # A row keeps what it would keep alone: its budget counts its own tokens.
        rows = zip(seen_mask.bool().sum(-1).tolist(), entries, strict=True)
        budgets = [min(config.entries(n, size), left) for n, left in rows]
        # Where one row keeps all, no slot is freed: then nobody loses an entry for nothing. And a
        # batch that has seen nothing but pads keeps those, for a cache cannot hold nothing.
        length = max(budgets)
        if packed is None and length in (0, kv_len):
            budgets, length = entries, kv_len
        row_budgets = torch.tensor(budgets, device=tokens.device)
    # Expanded from one element: the size is what counts, not the memory.
    capacity = torch.empty((), dtype=torch.uint8, device=tokens.device).expand(length)
    varies(capacity, 0)
    total = None
    if config.packs and strict:
        budgets = [length] * tokens.shape[0] if row_budgets is None else row_budgets.tolist()
        # A row of a single token has no tail: such a batch keeps everything. And what is cut again
        # has something beside its tail.
        if min(budgets) >= TAIL and (gap is None or max(budgets) > TAIL):
            total = sized(sum(budgets) - TAIL * len(budgets), tokens.device)
            varies(total, 0)
    return Plan(capacity, tokens, held_mask, row_budgets, gap, strict, seen, real, total)
