"""A layer of a model whose layers have attention and a recurrence each (Falcon-H1, Zamba 2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from .layers import EvictedLayer


class EvictedHybridLayer(LinearAttentionLayer, EvictedLayer):
    """An :class:`EvictedLayer` with the states of a convolution and of a recurrence beside it.

    Those summarise all tokens seen and are never cut. transformers' own layer of this kind takes
    the entries that it holds for the tokens that it has seen.
    """

    is_compileable = False

    def __init__(self, number_of_states: int = 1, **_: Any) -> None:
        EvictedLayer.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *keys_and_values: Tensor, **states: Any) -> None:
        """K and V come by position, states by name, as transformers calls it."""
        if keys_and_values:
            EvictedLayer.lazy_initialization(self, *keys_and_values)
        else:
            LinearAttentionLayer.lazy_initialization(self, **states)

    def offload(self) -> None:
        EvictedLayer.offload(self)
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        EvictedLayer.prefetch(self)
        LinearAttentionLayer.prefetch(self)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        EvictedLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        EvictedLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        # First the entries: they may refuse.
        EvictedLayer.crop(self, tokens_to_remove)
        LinearAttentionLayer.crop(self, tokens_to_remove)
