"""What the matcher says of a graph: an attention site, or a rejection with its reason."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Literal

from torch.fx import Node

Phase = Literal["prefill", "decode", "continuation"]


class Reason(enum.Enum):
    """Why an attention was left alone; the value is the cure."""

    TRAINING = "call model.eval() first: eviction is for inference"
    GRADIENTS = "run under torch.no_grad() or torch.inference_mode()"
    DROPOUT = "set the attention dropout to 0"
    OPERANDS = "give SDPA 4-D operands [B, H, Q, D] whose head counts and head_dim are static"
    NOT_CAUSAL = "none needed: only causal self-attention has a cache to evict from"
    OUTPUT_FORKS = "use the attention output in the output projection alone"
    OUTPUT_OP = "project the attention output directly, without a norm or the like in between"
    OUTPUT_AXES = "bring the output to [B, Q, H * D] (transpose(1, 2), then reshape) and project it"
    NO_PROJECTION = "follow the attention by a linear output projection"
    KEY_AXES = "keep K as [B, num_key_value_heads, K, D], repeated over groups at most"
    VALUE_AXES = "keep V as [B, num_key_value_heads, K, D], repeated over groups at most"
    CACHE_NOT_FOUND = (
        "return the K and V that the attention reads, or assign them to an attribute of the cache; "
        "a buffer written in place cannot shrink"
    )
    SLIDING_WINDOW = "none needed: a sliding-window cache is bounded already"
    SHARED_CACHE = "none: two attentions read one cache, and each would evict its own choice"
    PADDING_MASK = "use ckv_compile.optimize(model), which counts each row's tokens; or do not pad"
    UNCOUNTED_TOKENS = "none: the model caches tokens of its own beside those that it is given"
    WRITTEN_IN_PLACE = "export a model without in-place ops, or call run_decompositions({}) first"
    NESTED_GRAPH = (
        "export the whole call under torch.no_grad(), with no set_grad_enabled, autocast or "
        "control flow around the attention"
    )
    DECOMPOSED = "optimise the program that torch.export made, and decompose the optimised one"
    ATTENTION_UNREADABLE = 'load the model with attn_implementation="sdpa" where it has that'
    MASK_UNREADABLE = "use is_causal=True, or a mask that compares key and query positions"


@dataclasses.dataclass(frozen=True)
class Rejection:
    """An attention that was not matched: the guilty ``node``, the reason and what was seen."""

    node: Node
    reason: Reason
    detail: str
    name: str = ""

    @property
    def cure(self) -> str:
        return self.reason.value


@dataclasses.dataclass(frozen=True)
class Projection:
    """The output projection ``W_O``: ``weight`` is ``[E, H*D]``, or ``[H*D, E]`` if ``in_out``.

    ``gated``: the output is multiplied by a gate before; a value is scored as if it were 1.
    """

    node: Node
    weight: Node
    in_out: bool
    gated: bool = False


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One causal self-attention, its output projection and the cache tensors it leaves behind.

    ``sdpa`` is the node that holds the attention output ``[B, H, Q, Dv]``.

    ``cache_key`` and ``cache_value`` are the nodes *before* ``repeat_kv``: ``[B, Hkv, K, D]``, what
    the cache holds. ``key_outputs`` and ``value_outputs`` are their positions in the graph's
    output; none where the cache is written in place. ``q_len`` and ``kv_len`` may be symbolic.
    ``latent``: these are one head for all, of which attention's ``key`` and ``value`` are made.
    ``padding`` is false at pads, its column ``padding_offset + j`` is that of key ``j``.
    """

    index: int
    name: str
    sdpa: Node
    query: Node
    key: Node
    value: Node
    attn_mask: Node | None
    is_causal: bool
    scale: Node | float | None
    softcap: Node | float | None
    projection: Projection
    cache_key: Node
    cache_value: Node
    key_outputs: tuple[int, ...]
    value_outputs: tuple[int, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    value_head_dim: int
    batch_size: Any
    q_len: Any
    kv_len: Any
    phase: Phase
    mask_kind: str
    padding: Node | None = None
    padding_offset: Any = 0
    latent: bool = False

    @property
    def num_key_value_groups(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads
