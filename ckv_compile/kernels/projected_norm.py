"""How far a value, seen through the output projection, can move the layer's output."""

from __future__ import annotations

import dataclasses
import functools
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import projected_norm as cpu

# Rows and columns of the block in which products are made: 1 MiB, which stays in a core's L2 cache.
_ROWS, _COLUMNS = 256, 1024


def projected_norm(
    value: Tensor,
    weight: Tensor | None,
    in_out: bool,
    heads: int,
    norm: str,
    triton: bool = False,
) -> Tensor:
    """Twin of :func:`ckv_compile.kernels.reference.projected_norm`, traceable.

    Args:
        value: ``[B, Hkv, K, Dv]``, any float dtype.
        weight: ``[E, H*Dv]``, or ``[H*Dv, E]`` if ``in_out``; None for norm="value".
        heads: H, the number of query heads.
        norm: "l1" or "l2"; or "value", the L1 norm of the value as it is.
        triton: whether the device has Triton's kernels.

    Returns:
        ``[B, Hkv, K]`` float32, the mean over the query heads of a group. "l2" is
        ``sqrt(v G v^T)`` with the Gram matrix ``G = W W^T``, on CPUs ``||R v||_2`` with its root
        ``R^T R = G``: no product as wide as E.
    """
    if norm == "value":
        return value.float().abs().sum(-1)
    assert weight is not None
    quadratic = norm == "l2"
    if triton:
        from .gpu import projected_norm as gpu

        # Made in each call: a kept one would have to be checked on the host, and it costs
        # head_dim / kv_len of what the output projection does.
        if quadratic:
            weight, in_out = gram_of(weight, in_out, heads), True
        return gpu.projected_norm(value, weight, in_out, heads, quadratic)
    if quadratic:
        weight, in_out = torch.ops.ckv_compile.gram_root(weight, in_out, heads), True
    return torch.ops.ckv_compile.projected_norm(value, weight, in_out, heads, quadratic)


@dataclasses.dataclass(frozen=True)
class UnmadeNorm:
    """The arguments of :func:`projected_norm`: a selection may need it of few entries alone."""

    value: Tensor
    weight: Tensor | None
    in_out: bool
    heads: int
    norm: str
    triton: bool

    def made(self) -> Tensor:
        """``[B, Hkv, K]`` float32."""
        return projected_norm(
            self.value, self.weight, self.in_out, self.heads, self.norm, self.triton
        )


def projected_norms(
    value: Tensor,
    weight: Tensor | None,
    in_out: bool,
    heads: int,
    norm: str,
    triton: bool = False,
) -> Tensor:
    """The same of each query head, ``[B, H, K]`` float32: one call for each member of a group.

    Args as of :func:`projected_norm`.
    """
    kv_heads = value.shape[1]
    groups = heads // kv_heads
    if norm == "value" or groups == 1:
        mean = projected_norm(value, weight, in_out, heads, norm, triton)
        return mean.repeat_interleave(groups, 1)
    assert weight is not None
    if norm == "l2" and not triton:
        # By the kept matrix of the whole weight; of parts of it none would be kept.
        root = torch.ops.ckv_compile.gram_root(weight, in_out, heads)
        parts = root.reshape(kv_heads, groups, -1, root.shape[1])
        norms = [
            torch.ops.ckv_compile.projected_norm(value, part.flatten(0, 1), True, kv_heads, True)
            for part in parts.unbind(1)
        ]
    else:
        parts = _per_head(weight, in_out, heads).unflatten(0, (kv_heads, groups))
        norms = [
            projected_norm(value, part.flatten(0, 1), True, kv_heads, norm, triton)
            for part in parts.unbind(1)
        ]
    return torch.stack(norms, 2).flatten(1, 2)


def mean_of_groups(each: Tensor, kv_heads: int) -> Tensor:
    """``[B, H, K]`` to ``[B, Hkv, K]``: head by head, for a library's sum of few rows may add those
    of one column in another order than those of the next, and equal norms would differ."""
    members = each.unflatten(1, (kv_heads, -1)).unbind(2)
    return functools.reduce(torch.add, members) / len(members)


def _per_head(weight: Tensor, in_out: bool, heads: int) -> Tensor:
    """``W_O`` as ``[H, Dv, E]``, a view."""
    if in_out:
        return weight.reshape(heads, -1, weight.shape[1])
    return weight.reshape(weight.shape[0], heads, -1).permute(1, 2, 0)


def gram_of(weight: Tensor, in_out: bool, heads: int) -> Tensor:
    """``W W^T`` of each head, ``[H*Dv, Dv]`` float32."""
    per_head = _per_head(weight, in_out, heads).float()
    return (per_head @ per_head.transpose(-1, -2)).flatten(0, 1)


def root_of(weight: Tensor, in_out: bool, heads: int) -> Tensor:
    """The upper triangular ``R`` of each head with ``R^T R = W W^T``, ``[H*Dv, Dv]`` float32.

    Not of the Gram matrix, which may have lost to rounding what it is the root of.
    """
    per_head = _per_head(weight, in_out, heads).float()
    upper = torch.linalg.qr(per_head.transpose(-1, -2), mode="r").R
    missing = upper.shape[2] - upper.shape[1]  # rows, where E is less than Dv
    return F.pad(upper, (0, 0, 0, missing)).flatten(0, 1).contiguous()


# By the weight's id: a weak reference, what it looked like, its root.
_ROOTS: dict[int, tuple[weakref.ref[Tensor], tuple[object, ...], Tensor, Tensor]] = {}


@torch.library.custom_op("ckv_compile::gram_root", mutates_args=())
def _gram_root(weight: Tensor, in_out: bool, heads: int) -> Tensor:
    return kept_root(weight, in_out, heads).clone()


def kept_root(weight: Tensor, in_out: bool, heads: int) -> Tensor:
    """What :func:`root_of` makes; kept, so not to be written to."""
    # Kept for as long as the weight lives and is the same: it is made once for all prompts. A
    # write through `.data` (an adapter being merged) leaves the version as it was, so a sample of
    # the numbers is compared as well. A weight with adapters is a new one in each call, and so is
    # its root: a quarter of a second for a layer of a model of 8 billion parameters, on one core.
    if weight.is_inference():  # has no version
        return _unrounded(weight, in_out, heads)
    state = (weight._version, weight.data_ptr(), weight.stride(), in_out, heads)
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(flat.numel() // 256, 1)].clone()
    held = _ROOTS.get(id(weight))
    known = held is not None and held[0]() is weight and held[1] == state
    if held is not None and known and torch.equal(held[2], sample):
        return held[3]
    root = _unrounded(weight.detach(), in_out, heads)
    key = id(weight)
    gone = weakref.ref(weight, lambda _: _ROOTS.pop(key, None))
    _ROOTS[key] = (gone, state, sample, root)
    return root


def _unrounded(weight: Tensor, in_out: bool, heads: int) -> Tensor:
    # The caller's autocast and its lower precision of products would round it, and it is kept.
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        with torch.autocast(weight.device.type, enabled=False):
            return root_of(weight, in_out, heads)
    finally:
        torch.set_float32_matmul_precision(precision)


@_gram_root.register_fake
def _(weight: Tensor, in_out: bool, heads: int) -> Tensor:
    features = weight.shape[0 if in_out else 1]
    return weight.new_empty((features, features // heads), dtype=torch.float32)


def made_norm(value: Tensor, weight: Tensor, in_out: bool, heads: int, quadratic: bool) -> Tensor:
    """What :func:`projected_norm` makes of "l1" or, if ``quadratic``, "l2", at once: no op."""
    if quadratic:
        weight, in_out = kept_root(weight, in_out, heads), True
    return _mean_norms(value, weight, in_out, heads, quadratic)


def _mean_norms(value: Tensor, weight: Tensor, in_out: bool, heads: int, quadratic: bool) -> Tensor:
    if cpu.takes(value, weight):
        return cpu.mean_norms(value, weight, in_out, heads, quadratic)
    with torch.autocast(value.device.type, enabled=False):
        return _by_library_calls(value, weight, in_out, heads, quadratic)


# An op of ours, opaque to the compiler: Inductor does not fuse a reduction into a product and would
# write the whole [B, H, K, E] to memory first. Here only a block of it ever exists.
_projected_norm = torch.library.custom_op(
    "ckv_compile::projected_norm", _mean_norms, mutates_args=()
)


def _by_library_calls(
    value: Tensor, weight: Tensor, in_out: bool, heads: int, quadratic: bool
) -> Tensor:
    batch, kv_heads, kv_len, _ = value.shape
    groups, width = heads // kv_heads, weight.shape[1 if in_out else 0]
    norms = torch.zeros(batch, kv_heads, kv_len, dtype=torch.float32, device=value.device)
    per_head = _per_head(weight, in_out, heads)
    buffer = torch.empty(_ROWS * min(width, _COLUMNS), dtype=torch.float32, device=value.device)
    for h in range(heads):
        matrix = per_head[h].float()  # [Dv, E], or the root, by rows
        for b in range(batch):
            for start in range(0, kv_len, _ROWS):
                rows = value[b, h // groups, start : start + _ROWS].float()
                norm = norms[b, h // groups, start : start + _ROWS]
                if quadratic:
                    product = buffer[: rows.shape[0] * width].view(-1, width)
                    norm += torch.mm(rows, matrix.T, out=product).square_().sum(-1).sqrt_()
                    norm.masked_fill_(~rows.isfinite().all(-1), torch.nan)
                    continue
                for column in range(0, width, _COLUMNS):
                    part = matrix[:, column : column + _COLUMNS]
                    product = buffer[: rows.shape[0] * part.shape[1]].view(-1, part.shape[1])
                    norm += torch.mm(rows, part, out=product).abs_().sum(-1)
    return norms.div_(groups)


@_projected_norm.register_fake
def _(value: Tensor, weight: Tensor, in_out: bool, heads: int, quadratic: bool) -> Tensor:
    return value.new_empty(value.shape[:3], dtype=torch.float32)
