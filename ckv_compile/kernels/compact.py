"""Copy the kept entries of the cache into new, smaller tensors."""

from __future__ import annotations

from torch import Tensor


def compact(
    key: Tensor, value: Tensor, keep: Tensor, triton: bool = False
) -> tuple[Tensor, Tensor]:
    """Twin of :func:`ckv_compile.kernels.reference.compact`, traceable.

    Args:
        key, value: ``[B, Hkv, K, D]`` and ``[B, Hkv, K, Dv]``.
        keep: ``[B, Hkv, budget]`` int64, ascending.
        triton: whether the device has Triton's kernels.

    Returns:
        ``[B, Hkv, budget, D]`` and ``[B, Hkv, budget, Dv]``, contiguous, owning their storage.
    """
    if triton:
        from .gpu import compact as gpu

        return gpu.compact(key, value, keep)
    return _gathered(key, keep), _gathered(value, keep)


def _gathered(cache: Tensor, keep: Tensor) -> Tensor:
    return cache.gather(2, keep[..., None].expand(*keep.shape, cache.shape[3]))
