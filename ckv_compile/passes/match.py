"""Find every attention whose cache can be evicted. Pure: the graph is read, nothing is changed."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..site import AttentionSite, Phase, Projection, Reason, Rejection
from . import vocabulary as vocab
from .anchors import anchor_of, find_anchors
from .attention import Attention
from .axes import Layout, chain_above, follow, labelled, names_of, text_of, through
from .einsum import contraction_of
from .latent import sources_of
from .masks import Mask, read_mask


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
) -> tuple[tuple[AttentionSite, ...], tuple[Rejection, ...]]:
    """Every attention of ``gm``, as a site or as a rejection.

    Args:
        gm: a Dynamo graph with example values (static or symbolic shapes).
        training: whether the model is in training mode, where the caller knows.
        grad_enabled: whether autograd records.
        cut: the calls that leave a cut cache; of others less has to be understood.
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
            sites.append(_site_of(gm, found, len(sites), name, cut))
        except _Refused as refused:
            rejections.append(dataclasses.replace(refused.rejection, name=name))
    return _without_shared_caches(sites, rejections)


def _site_of(
    gm: GraphModule, attention: Attention, index: int, name: str, cut: Phase
) -> AttentionSite:
    node = attention.output
    if attention.dropout_p != 0:
        raise _Refused(node, Reason.DROPOUT, f"attention dropout is {attention.dropout_p}")
    batch, heads, q_len, head_dim = _operand_shape(node, attention.query, "query")
    value_head_dim = _operand_shape(node, attention.value, "value")[3]
    if not all(isinstance(size, int) for size in (heads, head_dim, value_head_dim)):
        raise _Refused(node, Reason.OPERANDS, "the head count or head_dim is symbolic")
    _operand_shape(node, attention.key, "key")

    projection = _projection_of(node, batch, heads, q_len, value_head_dim)
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
    mask_kind, mask = _mask_of(attention, q_len, kv_len, phase, cut)
    for cached in (cache_key, cache_value):
        same = vocab.known(cached.shape[0] == batch) and vocab.known(cached.shape[2] == kv_len)
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
        attn_mask=attention.attn_mask,
        is_causal=bool(attention.is_causal),
        scale=attention.scale,
        softcap=attention.softcap,
        projection=projection,
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
    )


def _operand_shape(sdpa: Node, operand: object, what: str) -> tuple[Any, ...]:
    shape = vocab.shape_of(operand)
    if shape is None or len(shape) != 4:
        raise _Refused(sdpa, Reason.OPERANDS, f"{what} has shape {shape}")
    return shape


def _phase_of(q_len: Any, kv_len: Any) -> Phase:
    """Decided at trace time, on the symbols: nothing is left to a run-time branch."""
    if vocab.known(q_len == 1):
        return "decode"
    return "prefill" if vocab.known(q_len == kv_len) else "continuation"


def _projection_of(sdpa: Node, batch: Any, heads: int, q_len: Any, head_dim: int) -> Projection:
    """Push ``[B, H, Q, D]`` downwards to the first op that is not a layout op."""
    layout: Layout | None = labelled("BHQD", (batch, heads, q_len, head_dim))
    node, gated = sdpa, False
    while True:
        users = [u for u in node.users if u.op != "output" and not vocab.only_measures(u, node)]
        if not users:
            raise _Refused(sdpa, Reason.NO_PROJECTION, f"{node.name} is not projected")
        if len(users) > 1:
            names = ", ".join(user.name for user in users)
            raise _Refused(sdpa, Reason.OUTPUT_FORKS, f"{node.name} is used by {names}")
        (user,) = users
        operands = vocab.projection_operands(user, node)
        if operands is not None:
            found = _checked_projection(sdpa, user, operands, layout, heads, head_dim)
            return dataclasses.replace(found, gated=gated)
        if contraction_of(user, node) is not None:
            found = _contracted(sdpa, user, node, layout, heads, head_dim)
            return dataclasses.replace(found, gated=gated)
        if vocab.is_training_dropout(user):
            raise _Refused(sdpa, Reason.TRAINING, f"{user.name} is a dropout in training mode")
        gate = vocab.factor_of(user, node)
        if gate is not None and not _depends(gate, sdpa):
            # W_O diag(gate) is another matrix for each query; the scores see W_O alone.
            node, gated = user, True
            continue
        op = vocab.layout_op_of(user)
        if op is None or user.args[0] is not node:
            detail = f"{user.name} ({vocab.name_of(user)}) stands before the projection"
            raise _Refused(sdpa, Reason.OUTPUT_OP, detail)
        assert layout is not None
        layout = through(op, layout, vocab.shape_of(user) or ())
        if layout is None:
            raise _Refused(sdpa, Reason.OUTPUT_AXES, f"{user.name} mixes the axes of the output")
        node = user


def _contracted(
    sdpa: Node, node: Node, source: Node, layout: Layout | None, heads: int, head_dim: int
) -> Projection:
    """A projection that is an einsum: it sums over the axis ``H*D``, or over both axes H and D."""
    found = contraction_of(node, source)
    assert found is not None and layout is not None
    names = names_of(layout)
    summed = {names[axis]: other for axis, other in found.met.items()}
    wanted = names_of(labelled("HD", (heads, head_dim)))
    if set(summed) == {"".join(wanted)}:
        weight_axes: tuple[int, ...] = ()
        in_out = found.free == 1
    elif len(summed) == 2 and set(summed) == set(wanted):
        weight_axes = (summed[wanted[0]], summed[wanted[1]], found.free)
        in_out = True
    else:
        detail = f"the projection {node.args[0]!r} reads {text_of(layout)}, and not all of H and D"
        raise _Refused(sdpa, Reason.OUTPUT_AXES, detail)
    _parameter(sdpa, found.weight)
    return Projection(node, found.weight, in_out, weight_axes=weight_axes)


def _parameter(sdpa: Node, weight: Node) -> None:
    """Refuse a weight that the model computes: it may differ from token to token."""
    root = chain_above(weight)[-1]
    if root.op not in ("placeholder", "get_attr"):
        detail = f"the projection's weight comes from {root.name}, not from a parameter"
        raise _Refused(sdpa, Reason.OUTPUT_OP, detail)


def _depends(node: Node, on: Node) -> bool:
    """Whether ``node`` is computed from the value of ``on``."""
    seen, todo = {node}, [node]
    while todo:
        for above in (one := todo.pop()).all_input_nodes:
            if vocab.only_measures(one, above):
                continue
            if above is on:
                return True
            if above not in seen:
                seen.add(above)
                todo.append(above)
    return False


def _checked_projection(
    sdpa: Node,
    node: Node,
    operands: tuple[Node, bool],
    layout: Layout | None,
    heads: int,
    head_dim: int,
) -> Projection:
    assert layout is not None
    weight, in_out = operands
    # The projection contracts the last axis: exactly H slow and D fast, or W_O^h is not a slice.
    contracted = names_of(labelled("HD", (heads, head_dim)))
    if names_of(layout)[-1] != "".join(contracted):
        detail = f"the projection reads {text_of(layout)}, not [.., H*D]"
        raise _Refused(sdpa, Reason.OUTPUT_AXES, detail)
    _parameter(sdpa, weight)
    return Projection(node, weight, in_out)


def _latents(gm: GraphModule, attention: Attention) -> tuple[_Cached, _Cached] | None:
    """The two tensors with one head each of which K and V are made; None if they are not so made.

    Where K or V is itself what the cache holds, this is no latent attention.
    """
    returned = vocab.outputs_of(gm)

    def is_cached(node: Node) -> bool:
        shape = vocab.shape_of(node) or ()
        one_head = len(shape) == 4 and vocab.known(shape[1] == 1)
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
    return _Cached(node, outputs, vocab.shape_of(node) or ())


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
    returned = vocab.outputs_of(gm)
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
    shape = vocab.shape_of(node)
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
) -> tuple[str, Mask]:
    """The mask in a word, and what it says. It is only read where the cache is cut."""
    node, attn_mask = attention.output, attention.attn_mask
    if phase != cut:
        return ("none" if attn_mask is None else "tensor"), Mask(())
    if attn_mask is None:
        # SDPA aligns is_causal with the first key: only for equal lengths that is what we mean.
        if attention.is_causal is not True or phase != "prefill":
            raise _Refused(node, Reason.NOT_CAUSAL, "every query sees every key")
        return "is_causal", Mask((), is_causal=True)
    if attention.is_causal is True or not isinstance(attn_mask, Node):
        detail = f"mask {attn_mask} with is_causal={attention.is_causal}"
        raise _Refused(node, Reason.MASK_UNREADABLE, detail)
    mask = read_mask(attn_mask, q_len, kv_len, additive=attention.additive)
    if isinstance(mask, str):
        raise _Refused(attn_mask, Reason.MASK_UNREADABLE, mask)
    return ("causal tensor" if mask.padding is None else "causal, padded"), mask


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
