"""The cache as a whole, and what a call does to it before and after it runs."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
)

from ..sizes import TAIL, sized
from . import files
from .fixed import FixedLayer
from .hybrid import EvictedHybridLayer
from .layers import EvictedLayer
from .packed import row_means


class EvictedCache(DynamicCache):
    """A ``DynamicCache`` whose full-attention layers remember their logical length.

    ``optimize`` passes one in where the caller passes none, and turns the empty full-attention
    layers of a caller's own ``DynamicCache`` into such layers.

    Args:
        config: of the model; without it layers are made as they are first used.
        max_new_tokens: if given, the tensors take this many tokens behind the prompt and keep
            their address and shape while they fill, as CUDA graphs need it; one more is a
            ``ValueError``. By default they grow by blocks.
    """

    def __init__(
        self, config: Any = None, *, max_new_tokens: int | None = None, **kwargs: Any
    ) -> None:
        if max_new_tokens is not None and (
            isinstance(max_new_tokens, bool)
            or not isinstance(max_new_tokens, int)
            or max_new_tokens < 1
        ):
            raise ValueError(f"max_new_tokens={max_new_tokens!r}; it takes an int >= 1, or None")
        super().__init__(config=config, **kwargs)
        adopt(self, max_new_tokens)
        # Of the model that filled the cache; ``compress`` notes it, ``load`` compares it.
        self.fingerprint = ""

    @property
    def nbytes(self) -> int:
        """Bytes of storage that the keys and values of all layers hold, room to grow included.

        With them counts what else is kept of each entry: its position, where attention has a bias
        that asks for it, and what policies choose by.
        """
        tensors = [t for layer in self.layers for t in _tensors(layer)]
        placed = (layer.positions for layer in evicted_layers(self))
        tensors += [positions for positions in placed if positions is not None]
        packed = (layer.packed for layer in evicted_layers(self))
        tensors += [part for store in packed if store is not None for part in store.beside]
        # Layers may share a store.
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Where the next query stands among the keys of ``get_mask_sizes``."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if isinstance(layer, FixedLayer) and layer.is_fixed:
            return layer.filled
        return super().get_query_offset(layer_idx)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to one safetensors file.

        Raises:
            ValueError: the cache is empty, or has layers of another kind (sliding windows, say).
        """
        files.write(path, self.layers, self.fingerprint)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: Any = None, device: str = "cpu"
    ) -> EvictedCache:
        """Read a cache that ``save`` wrote.

        Args:
            model: if given, it must be the one that filled the cache.
            device: where the tensors go.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, of another kind or version, or of another model.
        """
        cache = cls()
        cache.layers, cache.fingerprint = files.read(path, model, device)
        spread = max(packed_rows(cache) or [0])
        for layer in evicted_layers(cache):
            layer.spread = 0 if layer.profile else spread
        _share_sizes(cache)
        return cache


def _tensors(layer: Any) -> Iterator[Tensor]:
    if isinstance(layer, EvictedLayer):
        yield from layer.tensors()
    else:
        named = (getattr(layer, name, None) for name in ("keys", "values"))
        yield from (tensor for tensor in named if tensor is not None)


def adopt(cache: Any, max_new_tokens: int | None = None) -> None:
    """Give an empty ``DynamicCache`` layers that remember their logical length, in place."""
    if not isinstance(cache, DynamicCache):
        return
    made: Any = EvictedLayer
    if max_new_tokens is not None:
        made = functools.partial(FixedLayer, max_new_tokens)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.get_seq_length() == 0:
            cache.layers[i] = made()
        elif type(layer) is LinearAttentionAndFullAttentionLayer and layer.get_seq_length() == 0:
            cache.layers[i] = EvictedHybridLayer(layer.number_of_states)
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = made


def _make_layers(cache: Any, model: Any) -> None:
    """Make the layers of an empty cache now: those made in mid-call hear of no plan.

    Only full-attention layers are made as they are used, whatever the model's configuration says.
    """
    made = cache.layer_class_to_replicate if isinstance(cache, DynamicCache) else None
    if made in (None, DynamicLayer) or cache.layers:
        return
    like = self_attention_of(cache_for(model))
    if like is not None and all(isinstance(layer, EvictedLayer) for layer in like.layers):
        cache.layers = [made() for _ in like.layers]


def follows_rows(cache: Any) -> bool:
    """Whether the cache's full-attention layers can hold rows of different lengths."""
    # A class in place of DynamicLayer is ours: ``adopt`` has been here.
    made_later = getattr(cache, "layer_class_to_replicate", None) not in (None, DynamicLayer)
    return bool(evicted_layers(cache)) or made_later


def counts_all(cache: Any) -> bool:
    """Whether every layer that may be cut remembers how many tokens it has seen.

    Others would say that a cut prompt was short: later positions would be wrong, silently.
    """
    layers = (layer for layer in cache.layers if isinstance(layer, DynamicLayer))
    return all(isinstance(layer, EvictedLayer) or is_bounded(layer) for layer in layers)


def is_bounded(layer: Any) -> bool:
    """Whether the layer holds the last tokens alone: a sliding window, or a chunk."""
    return getattr(layer, "is_sliding", False)


def evicted_layers(cache: Any) -> list[EvictedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, EvictedLayer)]


def first_layer(cache: Any) -> EvictedLayer | None:
    """The first layer in use that may be cut: it speaks for all of them."""
    return next((layer for layer in evicted_layers(cache) if layer.is_initialized), None)


def tokens_seen(cache: Any) -> int:
    """Tokens that the cache's attention layers have seen; 0 for a cache that has none."""
    layers = (layer for layer in cache.layers if isinstance(layer, CacheLayerMixin))
    layer = first_layer(cache) or next(layers, None)
    return 0 if layer is None else layer.get_seq_length()


def _share_sizes(cache: Any) -> None:
    """One tensor for all layers with the same number: one input of a graph, one symbol."""
    for name in ("gap", "count"):
        shared: dict[int, Tensor] = {}
        for layer in evicted_layers(cache):
            size = getattr(layer, name)
            if size is not None:
                setattr(layer, name, shared.setdefault(size.shape[0], size))


@contextlib.contextmanager
def writing(cache: Any, model: Any, q_len: int, *, cutting: bool) -> Iterator[None]:
    """Around a call that brings ``q_len`` tokens: room before it, and on an error no trace of it.

    Args:
        cutting: whether the pass cuts what the call leaves in the cache.
    """
    layers = list(cache.layers)
    before = [dict(vars(layer)) for layer in layers]
    try:
        _make_layers(cache, model)
        for layer in evicted_layers(cache):
            layer.call = "cut" if cutting else "append"
            layer.reserve(q_len)
        _share_sizes(cache)
        yield
    except BaseException:
        cache.layers[:] = layers
        for layer, state in zip(layers, before, strict=True):
            layer.__dict__.clear()
            layer.__dict__.update(state)
            if isinstance(layer, FixedLayer):
                layer.rewind()
        raise
    for layer in evicted_layers(cache):
        if isinstance(layer, FixedLayer):
            layer.advance(q_len)
        layer.call, layer.plan = "", None


def is_packed(cache: Any) -> bool:
    """Whether the cache holds heads of different lengths."""
    layer = first_layer(cache)
    return layer is not None and layer.packed is not None


def has_fixed_layers(cache: Any) -> bool:
    """Whether its tensors are to keep their shape, see ``EvictedCache(max_new_tokens=...)``."""
    return any(isinstance(layer, FixedLayer) for layer in cache.layers) or isinstance(
        getattr(cache, "layer_class_to_replicate", None), functools.partial
    )


def takes_back(cache: Any) -> bool:
    """Whether tokens may be taken back after a call, as assisted decoding does."""
    return any(layer.record_past for layer in evicted_layers(cache))


def announce(cache: Any, plan: Any) -> None:
    """Tell the layers what the running call is to keep."""
    for layer in evicted_layers(cache):
        layer.plan = plan


def watch(cache: Any, model: Any) -> None:
    """Keep the last queries beside the entries."""
    # From the first call on: a call that finds none is another graph than one that finds some.
    _make_layers(cache, model)
    for layer in evicted_layers(cache):
        layer.watched = True


def most_held(cache: Any) -> int:
    """Entries in the fullest of the layers that may be cut; per head, where heads differ."""
    return max((layer.held + layer.spread for layer in evicted_layers(cache)), default=0)


def packed_rows(cache: Any) -> list[int] | None:
    """What each row holds packed, see ``row_means``; None if nothing is."""
    layers = [layer for layer in evicted_layers(cache) if layer.packed is not None]
    parts = [layer.packed for layer in layers if layer.packed is not None]
    return row_means(parts, layers[0].keys.shape[0]) if parts else None


def in_prompt(cache: Any) -> bool:
    """Whether several more tokens would be the next piece of a prompt that is fed in pieces.

    A prompt ends with the first single token that follows it, when ``compress`` returns, or when
    tokens are taken back (assisted decoding, ``crop``).
    """
    layer = first_layer(cache)
    return layer is None or not (layer.complete or takes_back(cache))


def finish_prompt(cache: Any) -> None:
    """What comes now is no piece of the prompt."""
    for layer in evicted_layers(cache):
        layer.complete = True
        if layer.is_initialized and layer.gap is None:
            layer.gap = sized(0, layer.device)  # of a prompt of one token nothing is cut


def can_cut_again(cache: Any) -> bool:
    """Whether all layers were cut alike: only then one budget and one mask serve them all."""
    layers = [layer for layer in evicted_layers(cache) if layer.is_initialized]
    alike = {(layer.held, layer.evicted) for layer in layers}
    return len(alike) == 1 and all(layer.gap is not None for layer in layers)


def settle(cache: Any, plan: Any, window_size: int) -> None:
    """After a call that was to keep what ``plan`` says: note what each layer has seen and holds.

    Args:
        window_size: the last tokens, all of which are held.
    """
    packed = are_packed(cache)
    for layer in evicted_layers(cache):
        if not layer.is_initialized:
            continue
        if packed:
            # A bound counts entries; policies have none.
            spread = 0 if plan.kinds is not None else plan.capacity.shape[0] - TAIL
            layer.settle_packed(plan.seen, spread)
            continue
        layer.packing = None
        if layer.packed is not None:
            continue  # nothing was cut
        held, valid = layer.held, plan.real
        cut = held == plan.capacity.shape[0]
        # A layer that was left whole has its entries where they were, however many came.
        evicted = plan.seen - held if cut else layer.evicted
        if cut and plan.real is not None and held < plan.real.shape[1]:
            slots = torch.arange(held, device=plan.row_budgets.device)
            valid = slots >= held - plan.row_budgets[:, None]
        layer.settle(evicted, window_size, valid)
    for layer in cache.layers:
        # A sliding window is cut out of the whole prompt's tensor, and would hold on to it.
        if getattr(layer, "is_sliding", False) and layer.is_initialized:
            layer.keys, layer.values = _alone(layer.keys), _alone(layer.values)
    _share_sizes(cache)


def are_packed(cache: Any) -> bool:
    """Whether a call has packed its layers; all of them or none.

    Raises:
        RuntimeError: some are and some are not, so no mask would fit them all.
    """
    layers = [layer for layer in evicted_layers(cache) if layer.is_initialized]
    packed = [layer.packing is not None and len(layer.packing[0]) > 0 for layer in layers]
    if any(packed) and not all(packed):
        raise RuntimeError(
            f"layer {packed.index(False)} could not be packed and others were: a graph break of "
            f"the model's own stands between them; take allocation='uniform'"
        )
    return any(packed)


def _alone(tensor: Tensor) -> Tensor:
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def row_bytes(cache: Any) -> tuple[int, list[tuple[int, int]]]:
    """Bytes of one entry of one row: in all layers that can be cut, and in each bounded one.

    With the latter comes the number of entries that it holds at most.
    """
    entry, bounded = 0, []
    for layer in cache.layers:
        held = layer.keys.shape if layer.is_initialized and layer.keys is not None else ()
        each = sum(t.nbytes for t in _tensors(layer)) // (held[0] * held[2]) if held else 0
        if isinstance(layer, EvictedLayer):
            entry += each
        elif each and getattr(layer, "sliding_window", None):
            bounded.append((each, layer.sliding_window - 1))
    return entry, bounded


def cache_for(model: Any) -> Cache | None:
    """A new cache for a model that would make itself a ``DynamicCache``; None for any other."""
    config = getattr(model, "config", None)
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if config is None or supports is None or not supports():
        return None
    if getattr(config, "is_encoder_decoder", False):
        return EncoderDecoderCache(EvictedCache(config=config), DynamicCache(config=config))
    return EvictedCache(config=config)


def self_attention_of(cache: Any) -> Any:
    """The part of a cache that grows by the decoder's tokens; None for what is no cache."""
    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache
    return cache if isinstance(cache, Cache) else None
