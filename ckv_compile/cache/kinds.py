"""What policies know of a cache: what its tail's tokens are, and which head has which policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..sizes import TAIL
from .evicted import are_packed, evicted_layers, first_layer


def kinds_held(cache: Any, kinds: Tensor) -> Tensor:
    """Of the tail's tokens and a call's, ``[B, t]`` and ``[B, Q]``, together.

    Raises:
        ValueError: tokens have come since that nobody told apart.
    """
    layer = first_layer(cache)
    if layer is None or layer.kinds is None:
        return kinds
    if missed := layer.held - layer.kinds.shape[1]:
        raise ValueError(
            "the cache was read on by another method, or by a model that is not optimised: of its "
            f"last {missed} tokens nobody told method='fastgen' which are special or punctuation. "
            "Go on without it, or begin a new cache"
        )
    return torch.cat([layer.kinds, kinds], dim=1)


def note_kinds(cache: Any, kinds: Tensor, plan: Any) -> None:
    """After a call and before ``settle``: what the tail's tokens are."""
    if plan is not None and are_packed(cache):
        real = torch.ones_like(kinds, dtype=torch.bool) if plan.real is None else plan.real
        columns = torch.where(real, torch.arange(kinds.shape[1], device=kinds.device), -1)
        kinds = kinds.gather(1, columns.topk(TAIL, dim=-1).values.flip(-1))
    for layer in evicted_layers(cache):
        layer.kinds = kinds


def has_policies(cache: Any) -> bool:
    """Whether heads keep what policies say; nothing else then cuts them."""
    layer = first_layer(cache)
    return layer is not None and bool(layer.profile)


def policies_of(cache: Any) -> list[list[list[int]]]:
    """Of each layer that has any the policies of its heads, ``[B][Hkv]``."""
    return [layer.profile[1].tolist() for layer in evicted_layers(cache) if layer.profile]
