"""What the matcher says of a graph: an attention site, or a rejection with its reason."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Literal

from torch.fx import Node

Phase = Literal["prefill", "decode", "continuation", "cross"]


class Reason(enum.Enum):
    """Why an attention was left alone; the value is the cure."""

    TRAINING = "call model.eval() first: eviction is for inference"
    GRADIENTS = "run under torch.no_grad() or torch.inference_mode()"
    DROPOUT = "set the attention dropout to 0"
    OPERANDS = "give SDPA 4-D operands [B, H, Q, D] whose head counts and head_dim are static"
    NOT_CAUSAL = "none needed: only causal self-attention has a cache to evict from"
    CROSS_ATTENTION = "none needed; pass cross_attention=True to evict an encoder's entries as well"
    OUTPUT_FORKS = (
        "use the attention output in the output projection and in low-rank adapters added to it "
        'alone (merge other adapters); or score without it: norm="value"'
    )
    OUTPUT_OP = (
        "project the attention output directly, by an op whose weight can be read, without a norm "
        'or the like in between; or score without the projection: norm="value"'
    )
    OUTPUT_AXES = "bring the output to [B, Q, H * D] (transpose(1, 2), then reshape) and project it"
    NO_PROJECTION = 'follow the attention by a linear output projection; or use norm="value"'
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
    POSITIONS = (
        "pass the positions of new tokens in, and make masks of the lengths of q and k: a cut "
        "cache is shorter than what it has seen"
    )
    NOT_PACKED = (
        "call ckv_compile.optimize(model) and leave it a transformers cache; allocation='uniform' "
        "cuts this layer in any case"
    )
    WRITTEN_IN_PLACE = "export a model without in-place ops, or call run_decompositions({}) first"
    NESTED_GRAPH = (
        "export the whole call under torch.no_grad(), with no set_grad_enabled, autocast or "
        "control flow around the attention"
    )
    DECOMPOSED = "optimise the program that torch.export made, and decompose the optimised one"
    ATTENTION_UNREADABLE = 'use scaled_dot_product_attention (attn_implementation="sdpa")'
    MASK_UNREADABLE = "use is_causal=True, or a mask that compares key and query positions"
    ROTATION = "score by another method: this one reads how a model rotates its queries"
    BIAS_UNREADABLE = "compute the bias from positions and parameters alone"


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
class Matrix:
    """``node`` multiplies by ``weight``, ``[out, in]``, or ``[in, out]`` if ``in_out``.

    ``opaque``: the weight is quantised, and only that op can read it. ``axes``: the order in which
    a weight of three axes is ``[H, D, E]``.
    """

    node: Node
    weight: Node
    in_out: bool
    opaque: bool = False
    axes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Branch:
    """A product of ``matrices``, first to last, times all ``factors``; of two it is a LoRA."""

    matrices: tuple[Matrix, ...] = ()
    factors: tuple[Node | float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Projection:
    """The output projection ``W_O``: ``matrix`` plus all ``adapters``; ``node`` holds the result.

    ``gated``: the output is multiplied by a gate before; a value is scored as if it were 1.
    """

    node: Node
    matrix: Matrix
    adapters: tuple[Branch, ...] = ()
    gated: bool = False


@dataclasses.dataclass(frozen=True)
class Bias:
    """Added to the logits: ``node`` broadcasts to ``[B, H, Q, K]``, or is ``[B*H, .., ..]``
    (``merged``). It says something of positions: an entry keeps its own."""

    node: Node
    merged: bool = False


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """One causal self-attention, its output projection and the cache tensors it leaves behind.

    ``sdpa`` is the node that holds the attention output ``[B, H, Q, Dv]``.

    ``cache_key`` and ``cache_value`` are the nodes *before* ``repeat_kv``: ``[B, Hkv, K, D]``, what
    the cache holds. ``key_outputs`` and ``value_outputs`` are their positions in the graph's
    output; none where the cache is written in place. ``q_len`` and ``kv_len`` may be symbolic.
    ``latent``: these are one head for all, of which attention's ``key`` and ``value`` are made.
    ``projection`` is None where it could not be read and no score asks for it.
    ``terms`` are all that acts on the logits; of them ``biases`` are added and are no masks.
    ``sinks`` ``[H]`` are logits of one more key for each head.
    ``phase`` "cross": K and V are an encoder's, in the first call of its decoder.
    ``padding`` is false at pads, its column ``padding_offset + j`` is that of key ``j``.
    """

    index: int
    name: str
    sdpa: Node
    query: Node
    key: Node
    value: Node
    is_causal: bool
    scale: Node | float | None
    softcap: Node | float | None
    projection: Projection | None
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
    terms: tuple[Node, ...] = ()
    biases: tuple[Bias, ...] = ()
    sinks: Node | None = None

    @property
    def attn_mask(self) -> Node | None:
        """The mask, or what stands for it first."""
        return self.terms[0] if self.terms else None

    @property
    def num_key_value_groups(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads
