"""What a call brings: its tokens, masks and cache, found by name and made ready for the region."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import Tensor, nn

from .sizes import varies

# The tensors whose axis 1 counts tokens; the first one present says how long the prompt is.
_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
MASKS = ("attention_mask", "decoder_attention_mask")
_LENGTH_AXIS_1 = (*_TOKENS, *MASKS, "position_ids", "token_type_ids")


def by_name(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with its positional arguments named, where the forward names them."""
    if not args:  # generate names everything; it need not be looked up at each token
        return (), dict(kwargs)
    parameters = list(inspect.signature(model.forward).parameters.values())[: len(args)]
    named = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(named) < len(args) or set(named) & set(kwargs):
        return args, dict(kwargs)
    return (), {**dict(zip(named, args, strict=True)), **kwargs}


def tokens_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The input whose axis 1 counts tokens: by its name, or else the first tensor of the call."""
    named = [kwargs[name] for name in _TOKENS if isinstance(kwargs.get(name), Tensor)]
    for value in (*named, *args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value if value.dim() >= 2 else None
    return None


def cache_room() -> Any:
    """``ckv_compile.cache``, where transformers is in use; a model of another origin needs none."""
    if "transformers" not in sys.modules:
        return None
    from . import cache

    return cache


def prepare_mask(
    kwargs: dict[str, Any],
    decoder_mask: str,
    cache: Any,
    tokens: Tensor | None,
    *,
    drops: bool = True,
) -> Tensor | None:
    """Drop masks that hide nothing, fit the decoder's to a filled cache; returns it if it hides.

    A 2-D mask of ones costs a ``[Q, K]`` tensor in the graph and says nothing.
    """
    kept = ""
    if cache is not None and tokens is not None:
        mask = kwargs.get(decoder_mask)
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            fitted = cache_room().physical_mask(cache, mask, tokens.shape[1])
            if fitted is not None:
                kwargs[decoder_mask] = fitted
            # One graph for all steps: the mask stays when the last slot is in use.
            kept = decoder_mask if cache_room().is_fixed(cache) else ""
    for name in MASKS if drops else ():
        mask = kwargs.get(name)
        if name == kept or not isinstance(mask, Tensor) or mask.dim() != 2:
            continue
        if bool((mask == 1).all()):
            kwargs[name] = None
    mask = kwargs.get(decoder_mask)
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def first_two(name: str, value: Any) -> Any:
    """An input of a call, as it would be for a prompt of two tokens."""
    counts = name in _LENGTH_AXIS_1 and isinstance(value, Tensor) and value.dim() >= 2
    return value[:, :2] if counts else value


def is_contiguous(mask: Tensor) -> bool:
    """Whether the real tokens of each row stand together."""
    real = mask.bool()
    starts = real[:, :1].sum(-1) + (real[:, 1:] & ~real[:, :-1]).sum(-1)
    return bool((starts <= 1).all())


def mark_dynamic(tokens: Tensor | None, kwargs: dict[str, Any]) -> None:
    """Tell Dynamo which sizes vary, so that the first prompt does not fix them."""
    if tokens is not None:
        varies(tokens, 1)
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            if name in _LENGTH_AXIS_1 and value.dim() >= 2:
                varies(value, 1)
                if value.dim() == 4:  # a ready-made mask [B, 1, Q, K]
                    varies(value, 2)
                    varies(value, 3)
            elif value.dim() == 1 and tokens is not None and len(value) == tokens.shape[1]:
                varies(value, 0)  # positions, whatever their name
        else:
            _mark_cache(value)


def mark_attributes(model: nn.Module, lengths: set[int]) -> None:
    """Tell Dynamo that the caches which a model keeps in its attributes grow, before they do.

    Without it the first token would be compiled for one length, and take positions of that length
    for constants.

    Args:
        lengths: those that a call leaves in a cache.
    """
    for module in model.modules():
        _mark_held(list(vars(module).values()), lengths)


def _mark_held(value: Any, lengths: set[int]) -> None:
    if isinstance(value, Tensor):
        if value.dim() == 4 and value.shape[2] in lengths:
            varies(value, 2)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _mark_held(item, lengths)
    elif isinstance(value, dict):
        _mark_held(list(value.values()), lengths)


def _mark_cache(value: Any) -> None:
    """The lengths of the ``[B, Hkv, K, D]`` tensors in a cache object or in nested tuples."""
    if isinstance(value, Tensor):
        if value.dim() == 4:
            varies(value, 2)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _mark_cache(item)
    elif isinstance(getattr(value, "layers", None), list):
        for layer in value.layers:
            if hasattr(layer, "declare_sizes"):
                layer.declare_sizes()
            else:
                _mark_cache((getattr(layer, "keys", None), getattr(layer, "values", None)))
    else:
        for part in ("self_attention_cache", "cross_attention_cache"):
            if hasattr(value, part):
                _mark_cache(getattr(value, part))
