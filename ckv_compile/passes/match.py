"""Find every attention whose cache can be evicted. Pure: the graph is read, nothing is changed."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..site import AttentionSite, Bias, Phase, Reason, Rejection
from . import mask_vocabulary as mask_vocab
from . import vocabulary as vocab
from .anchors import anchor_of, find_anchors
from .attention import Attention
from .axes import chain_above, follow, labelled, names_of, text_of, upstream
from .bias import wrong_with
from .latent import sources_of
from .masks import Mask, parts_of, read_terms
from .nodes import known, outputs_of, shape_of
from .projections import projection_of


class _Refused(Exception):
    """Carries a rejection out of the reading of one site; never leaves this file."""

    def __init__(self, node: Node, reason: Reason, detail: str) -> None:
        self.rejection = Rejection(node, reason, detail)


@dataclasses.dataclass(frozen=True)
class _Cached:
    """One of K and V: the cache tensor, where the graph returns it, and its sizes."""

    node: Node
    outputs: tuple[int, ...]
    shape: tuple[Any, ...]


def match_sites(
    gm: GraphModule,
    *,
    training: bool = False,
    grad_enabled: bool = False,
    cut: Phase = "prefill",
    tokens: Node | None = None,
    cross: bool = False,
    projected: bool = True,
) -> tuple[tuple[AttentionSite, ...], tuple[Rejection, ...]]:
    """Every attention of ``gm``, as a site or as a rejection.

    Args:
        gm: a Dynamo graph with example values (static or symbolic shapes).
        training: whether the model is in training mode, where the caller knows.
        grad_enabled: whether autograd records.
        cut: the calls that leave a cut cache; of others less has to be understood.
        tokens: those of the call, where it is known; K and V that are not made of them are an
            encoder's.
        cross: whether such entries are to be evicted.
        projected: whether the scores see values through the output projection.
    """
    sites: list[AttentionSite] = []
    rejections: list[Rejection] = []
    for found in find_anchors(gm):
        node = anchor_of(found)
        name = module_path_of(node)
        try:
            if training:
                raise _Refused(node, Reason.TRAINING, "the model is in training mode")
            if grad_enabled:
                raise _Refused(node, Reason.GRADIENTS, "autograd records this call")
            if isinstance(found, Rejection):
                raise _Refused(found.node, found.reason, found.detail)
            site = _site_of(gm, found, len(sites), name, cut, projected)
            sites.append(_cross(site, found, tokens, cross))
        except _Refused as refused:
            rejections.append(dataclasses.replace(refused.rejection, name=name))
    return _without_shared_caches(sites, rejections)


def _site_of(
    gm: GraphModule, attention: Attention, index: int, name: str, cut: Phase, projected: bool
) -> AttentionSite:
    node = attention.output
    if attention.dropout_p != 0:
        raise _Refused(node, Reason.DROPOUT, f"attention dropout is {attention.dropout_p}")
    batch, heads, q_len, head_dim = _operand_shape(node, attention.query, "query")
    value_head_dim = _operand_shape(node, attention.value, "value")[3]
    if not all(isinstance(size, int) for size in (heads, head_dim, value_head_dim)):
        raise _Refused(node, Reason.OPERANDS, "the head count or head_dim is symbolic")
    _operand_shape(node, attention.key, "key")

    projection = projection_of(node, (batch, heads, q_len, value_head_dim))
    if isinstance(projection, Rejection) and (projected or projection.reason is Reason.TRAINING):
        raise _Refused(projection.node, projection.reason, projection.detail)
    latents = _latents(gm, attention)
    if latents is not None:
        cache_key, cache_value = latents
    else:
        cache_key = _cached(gm, attention.key, Reason.KEY_AXES)
        cache_value = _cached(gm, attention.value, Reason.VALUE_AXES)
    num_key_value_heads, kv_len = cache_key.shape[1], cache_key.shape[2]
    if cache_value.shape[1] != num_key_value_heads or heads % num_key_value_heads:
        detail = f"{heads} heads over {num_key_value_heads} K and {cache_value.shape[1]} V heads"
        raise _Refused(node, Reason.OPERANDS, detail)
    phase = _phase_of(q_len, kv_len)
    if phase == cut and not (cache_key.outputs and cache_value.outputs):
        detail = f"{cache_key.node.name} is a part of a buffer that is written in place"
        raise _Refused(node, Reason.CACHE_NOT_FOUND, detail)
    mask_kind, mask, biases = _mask_of(attention, q_len, kv_len, phase, cut)
    for cached in (cache_key, cache_value):
        same = known(cached.shape[0] == batch) and known(cached.shape[2] == kv_len)
        # K and V of a later call carry the lengths of two cache tensors: two symbols.
        if phase == cut and not same:
            detail = f"{cached.node.name} is {cached.shape} for batch {batch} and {kv_len} keys"
            raise _Refused(node, Reason.OPERANDS, detail)
    return AttentionSite(
        index=index,
        name=name,
        sdpa=node,
        query=attention.query,
        key=attention.key,
        value=attention.value,
        is_causal=bool(attention.is_causal),
        scale=attention.scale,
        softcap=attention.softcap,
        projection=None if isinstance(projection, Rejection) else projection,
        cache_key=cache_key.node,
        cache_value=cache_value.node,
        key_outputs=cache_key.outputs,
        value_outputs=cache_value.outputs,
        num_attention_heads=heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        batch_size=batch,
        q_len=q_len,
        kv_len=kv_len,
        phase=phase,
        mask_kind=mask_kind,
        padding=mask.padding,
        padding_offset=mask.padding_offset,
        latent=latents is not None,
        terms=tuple(term.node for term in attention.terms),
        biases=biases,
        sinks=attention.sinks,
    )


def _cross(
    site: AttentionSite, attention: Attention, tokens: Node | None, wanted: bool
) -> AttentionSite:
    """The site, as one of cross-attention if its K and V are an encoder's."""
    # What is written in place does not show of which tokens it is made.
    asks = bool(site.key_outputs) and tokens is not None and tokens in upstream([site.query])
    if not asks or tokens in upstream([site.cache_key]):
        return site
    source = site.cache_key.name
    if not wanted:
        raise _Refused(site.sdpa, Reason.CROSS_ATTENTION, f"{source} is not of the call's tokens")
    parts = (part for term in attention.terms for part, _ in parts_of(term.node, term.kind))
    if attention.is_causal or not all(mask_vocab.is_zeros(part) for part in parts):
        detail = f"a mask hides some of {source}, and would not fit what is kept of it"
        raise _Refused(site.sdpa, Reason.CROSS_ATTENTION, detail)
    if not site.value_outputs or site.latent:
        raise _Refused(site.sdpa, Reason.CROSS_ATTENTION, f"{source} is not returned")
    return dataclasses.replace(site, phase="cross", mask_kind="none", biases=())


def _operand_shape(sdpa: Node, operand: object, what: str) -> tuple[Any, ...]:
    shape = shape_of(operand)
    if shape is None or len(shape) != 4:
        raise _Refused(sdpa, Reason.OPERANDS, f"{what} has shape {shape}")
    return shape


def _phase_of(q_len: Any, kv_len: Any) -> Phase:
    """Decided at trace time, on the symbols: nothing is left to a run-time branch."""
    if known(q_len == 1):
        return "decode"
    return "prefill" if known(q_len == kv_len) else "continuation"


def _latents(gm: GraphModule, attention: Attention) -> tuple[_Cached, _Cached] | None:
    """The two tensors with one head each of which K and V are made; None if they are not so made.

    Where K or V is itself what the cache holds, this is no latent attention.
    """
    returned = outputs_of(gm)

    def is_cached(node: Node) -> bool:
        shape = shape_of(node) or ()
        one_head = len(shape) == 4 and known(shape[1] == 1)
        return one_head and (any(value is node for value in returned) or _is_buffer(node))

    operands = (attention.key, attention.value)
    if any(is_cached(node) for operand in operands for node in chain_above(operand)):
        return None
    found = [sources_of(operand, 2, is_cached) for operand in operands]
    if found[0] is None or found[1] is None or len(found[0] | found[1]) != 2:
        return None
    # In the graph's order: the cache got K's part first.
    first, second = sorted(found[0] | found[1], key=list(gm.graph.nodes).index)
    return _latent(first, returned), _latent(second, returned)


def _latent(node: Node, returned: tuple[Any, ...]) -> _Cached:
    outputs = tuple(i for i, value in enumerate(returned) if value is node)
    return _Cached(node, outputs, shape_of(node) or ())


def _is_buffer(root: Node) -> bool:
    """Whether ``root`` is, or is a slice of, a tensor that is written in place."""
    source = root.args[0] if root.args else None
    if not isinstance(source, Node):
        return _is_written(root)
    if vocab.is_in_place(root) and chain_above(source)[-1].op in ("placeholder", "get_attr"):
        return True  # index_copy_ gives the buffer back
    return _is_written(source if vocab.is_slice_of(root, source) else root)


def _cached(gm: GraphModule, operand: Node, axes: Reason) -> _Cached:
    """The tensor above ``operand`` that the graph returns, before any repetition over groups."""
    returned = outputs_of(gm)
    chain = chain_above(operand)
    for depth, node in enumerate(chain):
        outputs = tuple(i for i, value in enumerate(returned) if value is node)
        if outputs:
            return _checked_cache(operand, node, outputs, chain[:depth][::-1], axes)
    if _is_buffer(chain[-1]):
        return _checked_cache(operand, chain[-1], (), chain[:-1][::-1], axes)
    for node in chain:
        for user in node.users:
            if vocab.is_slice_of(user, node) and user in returned:
                detail = f"the cache keeps {user.name}, a slice of {node.name}"
                raise _Refused(operand, Reason.SLIDING_WINDOW, detail)
    detail = f"the graph returns neither {operand.name} nor what it is made of"
    raise _Refused(operand, Reason.CACHE_NOT_FOUND, detail)


def _checked_cache(
    operand: Node, node: Node, outputs: tuple[int, ...], path: list[Node], axes: Reason
) -> _Cached:
    shape = shape_of(node)
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int):
        raise _Refused(operand, axes, f"the cache tensor {node.name} has shape {shape}")
    # The eviction node would copy what was there before, or after: it cannot know.
    if outputs and _is_written(node):
        detail = f"{node.name} is written in place"
        raise _Refused(operand, Reason.CACHE_NOT_FOUND, detail)
    if outputs and vocab.is_update(node):
        detail = f"{node.name} is a buffer of {shape[2]} slots with some of them replaced"
        raise _Refused(operand, Reason.CACHE_NOT_FOUND, detail)
    layout = follow(labelled("BhKD", shape), path)
    names = None if layout is None else names_of(layout)
    batch, heads, kv_len, head_dim = names_of(labelled("BhKD", shape))
    if names not in ((batch, heads, kv_len, head_dim), (batch, heads + "G", kv_len, head_dim)):
        detail = f"attention reads {text_of(layout)} of {node.name}, not [B, h*G, K, D]"
        raise _Refused(operand, axes, detail)
    return _Cached(node, outputs, shape)


def _is_written(node: Node) -> bool:
    """Whether an op writes to the tensor in place."""
    return any(vocab.is_in_place(user) and user.args[0] is node for user in node.users)


def _mask_of(
    attention: Attention, q_len: Any, kv_len: Any, phase: Phase, cut: Phase
) -> tuple[str, Mask, tuple[Bias, ...]]:
    """The mask in a word, what it says, and what else is added to the logits.

    It is only read where the cache is cut.
    """
    node, terms = attention.output, attention.terms
    if phase != cut:
        return ("tensor" if terms else "none"), Mask(()), ()
    if not terms and phase == "decode" and attention.is_causal is not True:
        return "none", Mask(()), ()  # the last token sees all
    if not terms:
        # SDPA aligns is_causal with the first key: only for equal lengths that is what we mean.
        if attention.is_causal is not True or phase != "prefill":
            raise _Refused(node, Reason.NOT_CAUSAL, "every query sees every key")
        return "is_causal", Mask((), is_causal=True), ()
    if attention.is_causal is True or not all(isinstance(term.node, Node) for term in terms):
        detail = f"mask {terms[0].node} with is_causal={attention.is_causal}"
        raise _Refused(node, Reason.MASK_UNREADABLE, detail)
    read = read_terms(terms, q_len, kv_len)
    if isinstance(read, str):
        raise _Refused(terms[0].node, Reason.MASK_UNREADABLE, read)
    mask, biases = read
    shape = shape_of(attention.query) or ()
    for bias in biases:
        wrong = wrong_with(bias, shape[0], shape[1], q_len, kv_len)
        if wrong:
            raise _Refused(bias.node, Reason.BIAS_UNREADABLE, wrong)
    if biases and phase != "prefill":
        detail = "its bias is known for a whole prompt alone"
        raise _Refused(node, Reason.BIAS_UNREADABLE, detail)
    kind = "causal tensor" if mask.padding is None else "causal, padded"
    return (f"{kind}, biased" if biases else kind), mask, biases


def _without_shared_caches(
    sites: list[AttentionSite], rejections: list[Rejection]
) -> tuple[tuple[AttentionSite, ...], tuple[Rejection, ...]]:
    owners: dict[Node, list[AttentionSite]] = {}
    for site in sites:
        for node in (site.cache_key, site.cache_value):
            owners.setdefault(node, []).append(site)
    alone: list[AttentionSite] = []
    for site in sites:
        others = {o.name for n in (site.cache_key, site.cache_value) for o in owners[n]}
        if len(owners[site.cache_key]) == len(owners[site.cache_value]) == 1:
            alone.append(dataclasses.replace(site, index=len(alone)))
        else:
            detail = f"{site.cache_key.name} serves {', '.join(sorted(others))}"
            rejection = Rejection(site.sdpa, Reason.SHARED_CACHE, detail, site.name)
            rejections = [*rejections, rejection]
    return tuple(alone), tuple(rejections)


def module_path_of(node: Node) -> str:
    """``model.layers.3.self_attn`` from the node's module stack; the node's name without one."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return dotted(path) or node.name


def dotted(source: str) -> str:
    """``L['self'].model.layers[0].self_attn`` as ``model.layers.0.self_attn``."""
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", source)
    path = re.sub(r"\._(modules|parameters|buffers)\b", "", path)
    parts = path.replace("(", "").replace(")", "").split(".")
    roots = {"L", "G", "self", "__self__", "fn", "forward", "call", "_call_impl", ""}
    while parts and parts[0] in roots:
        parts.pop(0)
    return ".".join(parts)


def example_inputs_require_grad(example_inputs: Any) -> bool:
    """Whether autograd would record a graph of these inputs."""
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs
    )
