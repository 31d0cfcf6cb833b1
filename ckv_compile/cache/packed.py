"""Entries of a cut prompt whose heads keep different numbers of them: nothing is padded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class PackedKV:
    """``keys`` ``[T, D]`` and ``values`` ``[T, Dv]``, one head after the other.

    Head ``h`` of row ``b`` has the entries from ``cu_kv_lens[b * Hkv + h]`` up to the next one's.
    ``cu_kv_lens`` is ``[B * Hkv + 1]`` int32 and need not begin at 0: several layers may share one
    store. ``beside`` are tensors ``[T]``, what else is known of each entry.
    """

    keys: Tensor
    values: Tensor
    cu_kv_lens: Tensor
    beside: tuple[Tensor, ...] = ()

    @property
    def lengths(self) -> Tensor:
        """Entries of each head, ``[B * Hkv]``."""
        return self.cu_kv_lens.diff()

    def rows(self, change: Callable[[Tensor], Tensor], batch: int) -> PackedKV:
        """Rows of the batch taken as ``change`` takes them of any tensor, in a store of its own."""
        chosen = change(torch.arange(batch, device=self.keys.device))
        heads = self.lengths.numel() // batch
        slots = (chosen[:, None] * heads + torch.arange(heads, device=chosen.device)).flatten()
        lengths, starts = self.lengths[slots].long(), self.cu_kv_lens[:-1][slots].long()
        ends = lengths.cumsum(0)
        within = torch.arange(int(ends[-1]), device=ends.device)
        within = within - (ends - lengths).repeat_interleave(lengths)
        at = starts.repeat_interleave(lengths) + within
        cu_kv_lens = torch.cat([ends.new_zeros(1), ends]).int()
        beside = tuple(part[at] for part in self.beside)
        return PackedKV(self.keys[at], self.values[at], cu_kv_lens, beside).in_use()

    def alone(self) -> PackedKV:
        """This layer's entries without those of others in the same store."""
        begin, end = int(self.cu_kv_lens[0]), int(self.cu_kv_lens[-1])
        cu_kv_lens = self.cu_kv_lens - begin
        beside = tuple(part[begin:end] for part in self.beside)
        return PackedKV(self.keys[begin:end], self.values[begin:end], cu_kv_lens, beside)

    def in_use(self) -> PackedKV:
        """A store that ends with its last head, but of two entries at least, for Dynamo's sake."""
        end = int(self.cu_kv_lens[-1])
        if end == len(self.keys) and end >= 2:
            return self
        parts = (self.keys, self.values, *self.beside)
        # What fills it up is never read.
        new = [part.new_zeros(max(end, 2), *part.shape[1:]) for part in parts]
        for to, part in zip(new, parts, strict=True):
            to[:end] = part[:end]
        return PackedKV(new[0], new[1], self.cu_kv_lens, tuple(new[2:]))

    def to(self, device: torch.device | str) -> PackedKV:
        """The same on another device."""
        parts = (self.keys, self.values, self.cu_kv_lens, *self.beside)
        moved = [part.to(device, non_blocking=True) for part in parts]
        return PackedKV(moved[0], moved[1], moved[2], tuple(moved[3:]))


def row_means(parts: Sequence[PackedKV], batch: int) -> list[int]:
    """Entries per head of each row, on average over the layers: whole numbers, as they were cut."""
    lengths = torch.cat([part.lengths.view(batch, -1) for part in parts], dim=1)
    means: list[int] = (lengths.sum(-1) // lengths.shape[1]).tolist()
    return means
