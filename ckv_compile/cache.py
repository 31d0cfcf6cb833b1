"""Caches that know how many tokens they have seen, not only how many they hold.

The only room that knows transformers; nobody imports it before transformers itself is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

_FORMAT, _VERSION = "ckv_compile.EvictedCache", 1


class EvictedLayer(DynamicLayer):
    """A dense cache layer ``[B, Hkv, K, D]`` that remembers its logical length.

    After an eviction it holds fewer entries than it has seen tokens: ``get_seq_length`` and all
    positions count the tokens, ``get_mask_sizes`` gives what is held and where it stands, as
    transformers' sliding-window layers do. Kept entries stay in temporal order.
    """

    def __init__(self, **_: Any) -> None:
        super().__init__()
        # Tokens seen and not held, plus 2, as the size of an empty tensor: Dynamo would compile
        # the decode step once for each value of a plain int.
        self.gap: Tensor | None = None
        # [B, kept] bool, False where a shorter row of a padded batch keeps fewer entries.
        self.valid: Tensor | None = None
        # Entries before the observation window: here tokens are missing in between.
        self.thinned = 0
        self.prompt_len = 0

    @property
    def evicted(self) -> int:
        """Tokens seen and no longer held."""
        return 0 if self.gap is None else self.gap.shape[0] - 2

    def get_seq_length(self) -> int:
        """Tokens seen, held or not."""
        return super().get_seq_length() + self.evicted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next call attends to, and the position of the first of them."""
        return super().get_seq_length() + query_length, self.evicted

    def settle(self, prompt_len: int, window_size: int, valid: Tensor | None) -> None:
        """Note what a prefill of ``prompt_len`` tokens has left, its window whole."""
        held = self.keys.shape[-2]
        self.gap, self.valid, self.prompt_len = _gap_of(prompt_len - held), valid, prompt_len
        self.thinned = max(held - window_size, 0)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: those of the observation window and those since.

        Raises:
            ValueError: it would reach further back, where tokens are missing in between.
        """
        whole = 0 if self.keys is None else self.keys.shape[-2] - self.thinned
        if self.evicted and -tokens_to_remove > whole:
            raise ValueError(
                f"crop({tokens_to_remove}) reaches into the evicted prompt: only the last {whole} "
                f"tokens, its observation window and what came since, can be removed"
            )
        super().crop(tokens_to_remove)
        if self.keys is not None and self.valid is not None:
            self.valid = self.valid[:, : self.keys.shape[-2]]
        self.prompt_len = min(self.prompt_len, self.get_seq_length())

    def reset(self) -> None:
        super().reset()
        self.gap = self.valid = None
        self.thinned = self.prompt_len = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self.valid is not None:
            self.valid = self.valid.index_select(0, beam_idx.to(self.valid.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.valid is not None:
            self.valid = self.valid.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.valid is not None:
            self.valid = self.valid[indices]


class EvictedCache(DynamicCache):
    """A ``DynamicCache`` whose full-attention layers are :class:`EvictedLayer`.

    ``optimize`` passes one in where the caller passes none, and turns the empty full-attention
    layers of a caller's own ``DynamicCache`` into such layers.

    Args:
        config: of the model; without it layers are made as they are first used.
    """

    def __init__(self, config: Any = None, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        adopt(self)
        # Of the model that filled the cache; ``compress`` notes it, ``load`` compares it.
        self.fingerprint = ""

    @property
    def nbytes(self) -> int:
        """Bytes of storage that the keys and values of all layers hold."""
        tensors = [t for layer in self.layers for t in _tensors(layer)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to one safetensors file.

        Raises:
            ValueError: the cache is empty, or has layers of another kind (sliding windows, say).
        """
        for i, layer in enumerate(self.layers):
            if not isinstance(layer, EvictedLayer):
                raise ValueError(f"layer {i} is a {type(layer).__name__}, which cannot be saved")
        if not self.layers or not all(layer.is_initialized for layer in self.layers):
            raise ValueError("the cache is empty: there is nothing to save")
        tensors = {}
        states = []
        for i, layer in enumerate(self.layers):
            for name in ("keys", "values", "valid"):
                tensor = getattr(layer, name)
                if tensor is not None:
                    tensors[f"{i}.{name}"] = tensor.contiguous()
            states.append([layer.evicted, layer.thinned, layer.prompt_len])
        metadata = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "fingerprint": self.fingerprint,
            "layers": json.dumps(states),
        }
        # Written beside and renamed: an interrupted save leaves the old file whole.
        partial = f"{os.fspath(path)}.partial"
        save_file(tensors, partial, metadata)
        os.replace(partial, path)

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
        where = os.fspath(path)
        if not os.path.exists(where):
            raise FileNotFoundError(f"{where}: no such cache file")
        try:
            with safe_open(where, "pt", device=device) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{where}: not a whole safetensors file ({error})") from None
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{where}: not a cache of ckv_compile")
        if metadata.get("version") != str(_VERSION):
            raise ValueError(
                f"{where}: cache format {metadata.get('version')}, this is version {_VERSION}"
            )
        if model is not None and metadata["fingerprint"] != fingerprint_of(model):
            raise ValueError(f"{where}: the cache was filled by another model or other weights")
        cache = cls()
        cache.fingerprint = metadata["fingerprint"]
        cache.layers = [
            _loaded_layer(where, i, state, tensors)
            for i, state in enumerate(json.loads(metadata["layers"]))
        ]
        _share_gaps(cache)
        return cache


def fingerprint_of(model: Any) -> str:
    """A hash of the names, shapes, dtypes and first values of a model's parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        values = parameter.detach().flatten()[:8].float().cpu()
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _loaded_layer(
    where: str, index: int, state: list[int], tensors: dict[str, Tensor]
) -> EvictedLayer:
    keys, values = (tensors.get(f"{index}.{name}") for name in ("keys", "values"))
    evicted, thinned, prompt_len = state
    if keys is None or values is None or keys.dim() != 4 or keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"{where}: layer {index} has no matching keys and values")
    layer = EvictedLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values, layer.valid = keys, values, tensors.get(f"{index}.valid")
    layer.gap = _gap_of(evicted)
    layer.thinned, layer.prompt_len = thinned, prompt_len
    if layer.valid is not None and layer.valid.shape[0] != keys.shape[0]:
        raise ValueError(f"{where}: layer {index} has rows that do not match")
    return layer


def _gap_of(evicted: int) -> Tensor:
    """See ``EvictedLayer.gap``; plus 2, for Dynamo specialises the sizes 0 and 1."""
    return torch.empty(evicted + 2, 0)


def _share_gaps(cache: Any) -> None:
    """One tensor for all layers that miss as many tokens: one input of the decode graph."""
    gaps: dict[int, Tensor] = {}
    for layer in evicted_layers(cache):
        if layer.gap is not None:
            layer.gap = gaps.setdefault(layer.evicted, layer.gap)


def _tensors(layer: Any) -> Iterator[Tensor]:
    for name in ("keys", "values"):
        tensor = getattr(layer, name, None)
        if tensor is not None:
            yield tensor


def adopt(cache: Any) -> None:
    """Give an empty ``DynamicCache`` layers that remember their logical length, in place."""
    if not isinstance(cache, DynamicCache):
        return
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and layer.get_seq_length() == 0:
            cache.layers[i] = EvictedLayer()
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = EvictedLayer


def follows_rows(cache: Any) -> bool:
    """Whether the cache's full-attention layers can hold rows of different lengths."""
    made_later = getattr(cache, "layer_class_to_replicate", None) is EvictedLayer
    return bool(evicted_layers(cache)) or made_later


def evicted_layers(cache: Any) -> list[EvictedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, EvictedLayer)]


def settle(cache: Any, prompt_len: int, window_size: int, row_budgets: Tensor | None) -> None:
    """After a fresh prefill: tell each layer how many tokens it has seen.

    Args:
        window_size: the last tokens, all of which are held.
        row_budgets: ``[B]`` entries that each row of a padded batch kept, in the last slots.
    """
    for layer in evicted_layers(cache):
        if not layer.is_initialized:
            continue
        held, valid = layer.keys.shape[-2], None
        if row_budgets is not None and held < prompt_len:
            slots = torch.arange(held, device=layer.keys.device)
            valid = slots >= held - row_budgets[:, None].to(slots.device)
        layer.settle(prompt_len, window_size, valid)
    _share_gaps(cache)


def physical_mask(cache: Any, attention_mask: Tensor) -> Tensor:
    """The caller's 2-D mask over all tokens seen, made to fit what the cache holds.

    transformers reads the columns from ``evicted`` on, one for each entry held: those of the kept
    prompt say which slots a row really filled.
    """
    layer = next((one for one in evicted_layers(cache) if one.gap is not None), None)
    if layer is None or not layer.evicted or attention_mask.shape[1] < layer.prompt_len:
        return attention_mask
    kept = attention_mask.new_ones(attention_mask.shape[0], layer.prompt_len)
    if layer.valid is not None:
        kept[:, layer.evicted :] = layer.valid.to(kept.dtype)
    return torch.cat([kept, attention_mask[:, layer.prompt_len :]], dim=1)


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
