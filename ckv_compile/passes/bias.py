"""Biases that depend on positions (ALiBi, T5's relative bias), where the cache has been cut.

A model computes them for keys at ``0 .. K - 1``. After an eviction slot ``j`` holds another
position in each head: the bias is computed for all tokens seen, and taken at the positions held.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..kernels.window_attention import with_heads
from ..site import Bias
from . import mask_vocabulary as mask_vocab
from . import vocabulary as vocab
from .attention import Attention, Term, find_attentions
from .axes import chain_above, upstream
from .masks import parts_of, read_mask
from .nodes import annotate, called, is_parameter, is_size, known, shape_of, value_of


@torch.library.custom_op("ckv_compile::positions", mutates_args=())
def positions_marker(key: Tensor, positions: Tensor, seen: int) -> Tensor:
    """Say in a traced graph where the entries of ``key`` ``[B, Hkv, K, D]`` stood.

    ``positions`` ``[B, Hkv, K]`` int64 are slots of the uncut cache of ``seen`` tokens. The pass
    takes the marker out again.

    Raises:
        RuntimeError: it is run, so no pass has been here.
    """
    raise RuntimeError(
        "the model adds a bias by position to its attention and this cache is cut: only the "
        "compiled model can continue it; call it after ckv_compile.optimize(model), in eval mode "
        "and under torch.no_grad()"
    )


@positions_marker.register_fake
def _(key: Tensor, positions: Tensor, seen: int) -> Tensor:
    return positions.new_empty(0)


class BiasAt(nn.Module):
    """A bias for all tokens seen, at the entries that each head holds."""

    def __init__(self, heads: int, merged: bool) -> None:
        super().__init__()
        self.heads, self.merged = heads, merged

    def forward(self, bias: Tensor, positions: Tensor) -> Tensor:
        """``[.., Q or 1, seen]`` and ``[B, Hkv, K]`` to ``[B, H, Q or 1, K]``, or as it came."""
        bias = with_heads(bias, self.heads)
        groups = self.heads // positions.shape[1]
        index = positions.repeat_interleave(groups, 1)[:, :, None]
        batch, _, _, kv_len = index.shape
        index = index.expand(batch, self.heads, bias.shape[2], kv_len)
        taken = bias.expand(batch, self.heads, -1, -1).gather(3, index)
        return taken.flatten(0, 1) if self.merged else taken

    def extra_repr(self) -> str:
        """All that the body depends on; the compile cache is keyed by it."""
        return f"heads={self.heads}, merged={self.merged}"


def wrong_with(bias: Bias, batch: Any, heads: int, q_len: Any, kv_len: Any) -> str:
    """Why a bias cannot be followed to where the cache is cut; "" if it can."""
    shape = shape_of(bias.node)
    if shape is None or len(shape) > 4:
        return f"bias {bias.node.name} has shape {shape}"
    wanted: tuple[Any, ...] = (batch, heads, q_len, kv_len)
    wanted = (batch * heads, q_len, kv_len) if bias.merged else wanted[4 - len(shape) :]
    for size, length in zip(shape, wanted, strict=True):
        if not known(size == 1) and not known(size == length):
            return f"bias {bias.node.name} is {tuple(shape)} for {tuple(wanted)}"
    for node in upstream([bias.node]):
        value = value_of(node)
        # What else comes into the graph may hide pads, or change with the cache; a number cannot.
        outside = node.op == "placeholder" and isinstance(value, torch.Tensor) and value.dim() > 0
        if outside and not is_parameter(node):
            return f"bias {bias.node.name} is computed from {node.name}"
    return ""


def place_biases(gm: GraphModule) -> None:
    """Give every attention over a cut cache the bias of the positions held, in place.

    Raises:
        NotImplementedError: a bias cannot be computed for the tokens that are no longer held.
    """
    markers = [node for node in gm.graph.nodes if vocab.is_ours(node, "positions")]
    if not markers:
        return
    read = [one for one in find_attentions(gm) if isinstance(one, Attention)]
    for marker in markers:
        key, positions, seen = marker.args
        found = [attention for attention in read if key in chain_above(attention.key)]
        if not found:
            raise NotImplementedError(_impossible(f"attention over {key} is not read"))
        for attention in found:
            _place(gm, attention, positions, seen)
        gm.graph.erase_node(marker)


def _impossible(why: str) -> str:
    return (
        f"ckv_compile: {why}: the bias cannot be had for a cache that is cut; "
        "call this model with budget=1.0"
    )


def _place(gm: GraphModule, attention: Attention, positions: Node, seen: Any) -> None:
    for term in attention.terms:
        new = {
            node: _placed(gm, attention, term, node, positions, seen)
            for node, kind in parts_of(term.node, term.kind)
            if kind == "added" and _varies(node)
        }
        if new:
            # Layers share a bias and its mask, but not the positions: each gets a copy.
            _copy(gm, term.node, new, term.user)
            term.user.replace_input_with(term.node, new[term.node])


def _varies(node: Node) -> bool:
    """Whether a part of the logits is no mask, and differs from key to key."""
    mask = mask_vocab.masking_where(node) is not None or read_mask(node) is not None
    last = (shape_of(node) or (1,))[-1]
    return not (mask or mask_vocab.is_zeros(node) or known(last == 1))


def _placed(
    gm: GraphModule, attention: Attention, term: Term, bias: Node, positions: Node, seen: Any
) -> Node:
    """A new node: the bias at the positions held."""
    batch, heads, q_len, _ = shape_of(attention.query) or ()
    kv_len = (shape_of(attention.key) or ())[2]
    wrong = wrong_with(Bias(bias, term.merged), batch, heads, q_len, kv_len)
    # The same ops once more, for all tokens seen where they were for the entries held.
    whole = {node: seen for node in upstream([bias]) if is_size(node, kv_len)}
    if not wrong:
        _copy(gm, bias, whole, term.user)
        total = value_of(seen) if isinstance(seen, Node) else seen
        # May add a guard: a table of biases ends somewhere.
        if not bool((shape_of(whole[bias]) or (0,))[-1] == total):
            wrong = f"bias {bias.name} does not follow the length of the cache"
    if wrong:
        raise NotImplementedError(_impossible(wrong))
    name = f"ckv_bias_{len([n for n, _ in gm.named_children() if n.startswith('ckv_bias_')])}"
    module = BiasAt(heads, term.merged)
    gm.add_submodule(name, module)
    with gm.graph.inserting_before(term.user):
        node = gm.graph.call_module(name, (whole[bias], positions))
    annotate(node, module, like=term.user)
    return node


def _copy(gm: GraphModule, node: Node, new: dict[Node, Any], before: Node) -> None:
    """Copy what of ``node``'s cone depends on the keys of ``new``, and map ``node`` in it."""
    cone = upstream([node])
    for one in gm.graph.nodes:  # operands come first
        if one in cone and one not in new and any(above in new for above in one.all_input_nodes):
            with gm.graph.inserting_before(before):
                copied = gm.graph.node_copy(one, lambda n: new.get(n, n))
            annotate(copied, called(copied), like=one)
            new[one] = copied
    new.setdefault(node, node)
