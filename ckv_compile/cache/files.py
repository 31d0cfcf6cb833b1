"""A cache in one safetensors file, and back; whatever else a file holds is refused."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..sizes import sized
from .layers import EvictedLayer
from .packed import PackedKV

_FORMAT = "ckv_compile.EvictedCache"
# Version 2 adds packed layers, 3 the policies of their heads; a file says the least that it needs.
_VERSIONS = ("1", "2", "3")
_PACKED = ("packed_keys", "packed_values", "cu_kv_lens")


def write(path: str | os.PathLike[str], layers: list[Any], fingerprint: str) -> None:
    """See ``EvictedCache.save``."""
    for i, layer in enumerate(layers):
        if not isinstance(layer, EvictedLayer):
            raise ValueError(f"layer {i} is a {type(layer).__name__}, which cannot be saved")
    if not layers or not all(layer.is_initialized for layer in layers):
        raise ValueError("the cache is empty: there is nothing to save")
    tensors: dict[str, Tensor] = {}
    states = []
    for i, layer in enumerate(layers):
        for name in ("keys", "values", "valid", "positions", "kinds", "recent"):
            tensor = getattr(layer, name)
            if tensor is not None:
                # Cloned, as what follows: a file holds no two tensors of one storage.
                tensors[f"{i}.{name}"] = tensor.clone(memory_format=torch.contiguous_format)
        tensors |= {f"{i}.profile.{j}": part.clone() for j, part in enumerate(layer.profile)}
        if layer.packed is not None:
            alone = layer.packed.alone()
            parts = (alone.keys, alone.values, alone.cu_kv_lens)
            named = zip(_PACKED, parts, strict=True)
            tensors |= {f"{i}.{name}": part.clone() for name, part in named}
            tensors |= {f"{i}.beside.{j}": part.clone() for j, part in enumerate(alone.beside)}
        states.append([layer.evicted, layer.thinned, layer.prompt_len])
    metadata = {
        "format": _FORMAT,
        "version": _VERSIONS[
            max((layer.packed is not None) + bool(layer.profile) for layer in layers)
        ],
        "fingerprint": fingerprint,
        "layers": json.dumps(states),
    }
    # Written beside and renamed: an interrupted save leaves the old file whole.
    partial = f"{os.fspath(path)}.partial"
    save_file(tensors, partial, metadata)
    os.replace(partial, path)


def read(path: str | os.PathLike[str], model: Any, device: str) -> tuple[list[EvictedLayer], str]:
    """Layers and fingerprint; see ``EvictedCache.load``."""
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
    if metadata.get("version") not in _VERSIONS:
        raise ValueError(
            f"{where}: cache format {metadata.get('version')}, this reads {', '.join(_VERSIONS)}"
        )
    if model is not None and metadata["fingerprint"] != fingerprint_of(model):
        raise ValueError(f"{where}: the cache was filled by another model or other weights")
    states = enumerate(json.loads(metadata["layers"]))
    layers = [_layer(where, i, state, tensors) for i, state in states]
    return layers, metadata["fingerprint"]


def fingerprint_of(model: Any) -> str:
    """A hash of the names, shapes, dtypes and first values of a model's parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        values = parameter.detach().flatten()[:8].float().cpu()
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _layer(where: str, index: int, state: list[int], tensors: dict[str, Tensor]) -> EvictedLayer:
    keys, values = (tensors.get(f"{index}.{name}") for name in ("keys", "values"))
    evicted, thinned, prompt_len = state
    if keys is None or values is None or keys.dim() != 4 or keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"{where}: layer {index} has no matching keys and values")
    layer = EvictedLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values, layer.valid = keys, values, tensors.get(f"{index}.valid")
    layer.gap = sized(evicted, keys.device)
    layer.thinned, layer.prompt_len, layer.complete = thinned, prompt_len, True
    layer.positions = tensors.get(f"{index}.positions")
    layer.kinds, layer.recent = tensors.get(f"{index}.kinds"), tensors.get(f"{index}.recent")
    layer.profile = _numbered(tensors, f"{index}.profile")
    if f"{index}.{_PACKED[0]}" in tensors:
        packed_keys, packed_values, cu_kv_lens = (tensors[f"{index}.{name}"] for name in _PACKED)
        beside = _numbered(tensors, f"{index}.beside")
        layer.packed = PackedKV(packed_keys, packed_values, cu_kv_lens, beside)
        if layer.packed.cu_kv_lens.numel() != keys.shape[0] * keys.shape[1] + 1:
            raise ValueError(f"{where}: layer {index} has heads that do not match")
    if layer.valid is not None and layer.valid.shape[0] != keys.shape[0]:
        raise ValueError(f"{where}: layer {index} has rows that do not match")
    return layer


def _numbered(tensors: dict[str, Tensor], name: str) -> tuple[Tensor, ...]:
    """``name.0``, ``name.1`` and so on."""
    count = sum(one.startswith(f"{name}.") for one in tensors)
    return tuple(tensors[f"{name}.{j}"] for j in range(count))
