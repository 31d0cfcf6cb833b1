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
    store.
    """

    keys: Tensor
    values: Tensor
    cu_kv_lens: Tensor

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
        return PackedKV(self.keys[at], self.values[at], cu_kv_lens)

    def alone(self) -> PackedKV:
        """This layer's entries without those of others in the same store."""
        begin, end = int(self.cu_kv_lens[0]), int(self.cu_kv_lens[-1])
        cu_kv_lens = self.cu_kv_lens - begin
        return PackedKV(self.keys[begin:end], self.values[begin:end], cu_kv_lens)

    def to(self, device: torch.device | str) -> PackedKV:
        """The same on another device."""
        parts = (self.keys, self.values, self.cu_kv_lens)
        return PackedKV(*(part.to(device, non_blocking=True) for part in parts))


def row_means(parts: Sequence[PackedKV], batch: int) -> list[int]:
    """Entries per head of each row, on average over the layers: whole numbers, as they were cut."""
    lengths = torch.cat([part.lengths.view(batch, -1) for part in parts], dim=1)
    means: list[int] = (lengths.sum(-1) // lengths.shape[1]).tolist()
    return means
