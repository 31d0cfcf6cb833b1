"""Caches that know how many tokens they have seen, not only how many they hold.

The only room that knows transformers; nobody imports it before transformers itself is loaded.
"""

from transformers import DynamicCache

from .evicted import (
    EvictedCache,
    adopt,
    announce,
    cache_for,
    can_cut_again,
    counts_all,
    finish_prompt,
    first_layer,
    follows_rows,
    has_fixed_layers,
    in_prompt,
    is_packed,
    most_held,
    packed_rows,
    row_bytes,
    self_attention_of,
    settle,
    takes_back,
    tokens_seen,
    watch,
    writing,
)
from .files import fingerprint_of
from .kinds import has_policies, kinds_held, note_kinds, policies_of
from .layers import EvictedLayer
from .masks import bounded_layers_agree, is_fixed, physical_mask
from .packed import PackedKV

__all__ = [
    "DynamicCache",
    "EvictedCache",
    "EvictedLayer",
    "PackedKV",
    "adopt",
    "announce",
    "bounded_layers_agree",
    "cache_for",
    "can_cut_again",
    "counts_all",
    "fingerprint_of",
    "finish_prompt",
    "first_layer",
    "follows_rows",
    "has_fixed_layers",
    "has_policies",
    "in_prompt",
    "is_fixed",
    "is_packed",
    "kinds_held",
    "most_held",
    "note_kinds",
    "packed_rows",
    "physical_mask",
    "policies_of",
    "row_bytes",
    "self_attention_of",
    "settle",
    "takes_back",
    "tokens_seen",
    "watch",
    "writing",
]
