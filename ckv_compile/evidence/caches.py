"""Caches cut to what a method would keep, without running the text again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..cache import EvictedCache, EvictedLayer, PackedKV
from ..cache.evicted import evicted_layers
from ..sizes import TAIL, sized


def fresh_cache(model: Any) -> EvictedCache:
    """An empty cache whose tensors a :class:`Watcher` shows.

    Raises:
        ValueError: the model is none of transformers', or makes another kind of cache.
    """
    from ..cache import cache_for

    cache = cache_for(model)
    if not isinstance(cache, EvictedCache):
        raise ValueError(
            f"a {type(model).__name__} makes no cache of its own that can be cut; this takes a "
            "decoder-only transformers model"
        )
    return cache


def layers_of(cache: EvictedCache, addresses: Mapping[str, int]) -> dict[str, int]:
    """Which layer holds the keys at each address: those that a site has shown, by its name."""
    held = {
        layer.keys.data_ptr(): i
        for i, layer in enumerate(cache.layers)
        if isinstance(layer, EvictedLayer) and layer.is_initialized
    }
    return {name: held[address] for name, address in addresses.items() if address in held}


def uncut_layers(cache: EvictedCache, keep: Mapping[int, Tensor]) -> list[int]:
    """Full-attention layers that nobody cuts: one mask cannot serve them and the others."""
    layers = enumerate(cache.layers)
    return [i for i, layer in layers if isinstance(layer, EvictedLayer) and i not in keep]


def cut(full: EvictedCache, keep: Mapping[int, Tensor], seen: int, room: int = 1) -> EvictedCache:
    """A cache that has seen ``seen`` tokens and holds the positions ``keep`` of each layer.

    Args:
        full: of a batch of one; it stays as it is. Layers with a sliding window are copied.
        keep: ``[M, Hkv, b]`` for each full-attention layer; the new cache has M rows.
        room: for so many tokens, which are then written in place.
    """
    rows = next(iter(keep.values())).shape[0]
    new = copy.copy(full)
    new.layers = []
    for i, layer in enumerate(full.layers):
        if i not in keep:
            other = copy.deepcopy(layer)
            other.batch_repeat_interleave(rows)
            new.layers.append(other)
            continue
        positions = keep[i]
        made = EvictedLayer()
        made.update(_taken(layer.keys, positions), _taken(layer.values, positions))
        made.gap = sized(seen - positions.shape[2])
        made.prompt_len, made.complete = seen, True
        made.reserve(room)
        new.layers.append(made)
    return new


def cut_packed(
    full: EvictedCache, keep: Mapping[int, Tensor], seen: int, room: int = 1
) -> EvictedCache:
    """The same with heads that keep different numbers of entries, as a packing prefill leaves it.

    Args:
        keep: ``[M, Hkv, K]`` bool for each full-attention layer, the last tokens among them; the
            new cache has M rows, which only an optimised model can read.
    """
    new = cut(full, {i: _last(mask) for i, mask in keep.items()}, seen, room)
    for i, mask in keep.items():
        before = mask[:, :, :-TAIL]
        _, heads, places = before.nonzero(as_tuple=True)
        lengths = before.sum(-1).flatten().cumsum(0)
        cu_kv_lens = torch.cat([lengths.new_zeros(1), lengths]).int()
        layer = full.layers[i]
        packed = PackedKV(layer.keys[0, heads, places], layer.values[0, heads, places], cu_kv_lens)
        new.layers[i].packed = packed
    return new


def held_by_policies(cache: EvictedCache) -> tuple[int, int]:
    """Entries per KV head, the mean, and their bytes behind a prompt under policies.

    What the policies note of each entry counts.
    """
    entries = heads = nbytes = 0
    for layer in evicted_layers(cache):
        if layer.packed is None:
            raise ValueError("method='fastgen' left a layer whole: it packs all layers or none")
        own, packed = layer.packed.lengths.numel(), int(layer.packed.lengths.sum())
        entry = layer.packed.keys[0].nbytes + layer.packed.values[0].nbytes
        noted = sum(part[0].nbytes for part in layer.packed.beside)
        entries, heads = entries + packed + own * TAIL, heads + own
        nbytes += (packed + own * TAIL) * entry + packed * noted
    return entries // heads, nbytes


def _last(mask: Tensor) -> Tensor:
    """The positions of the tail, ``[M, Hkv, 2]``."""
    kv_len = mask.shape[2]
    return torch.arange(kv_len - TAIL, kv_len).expand(*mask.shape[:2], TAIL)


def _taken(cached: Tensor, positions: Tensor) -> Tensor:
    """``[1, Hkv, K, D]`` at ``[M, Hkv, b]``: ``[M, Hkv, b, D]``."""
    rows, heads, budget = positions.shape
    index = positions[..., None].expand(rows, heads, budget, cached.shape[3])
    return cached.expand(rows, -1, -1, -1).gather(2, index)
