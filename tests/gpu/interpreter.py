"""Runs Triton kernels on CPU tensors, a GPU's generated code too, with Triton's own interpreter.

To be imported where TRITON_INTERPRET is set before Triton is imported. What Triton 3.9 leaves wrong
or out is put right here:

- bfloat16 numbers are stored as their bits, and were added, multiplied and rounded as integers;
- an access outside of all tensors passed unnoticed;
- a number passed to a kernel stayed a Python float;
- reductions with a function of their own went through Python once an element, and each call of a
  function from a kernel patched Triton's language anew;
- there are no device libraries, and no driver.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language as tl
from gpu import wrapper
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before Triton is imported"

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


def _floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bits(floats: np.ndarray) -> np.ndarray:
    """To nearest, ties to even, as a GPU rounds; NaN stays NaN."""
    whole = np.ascontiguousarray(floats, np.float32).view(np.uint32)
    rounded = (whole + 0x7FFF + ((whole >> 16) & 1)) >> 16
    return np.where(np.isnan(floats), 0x7FC0, rounded).astype(np.uint16)


def _is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def _widened(handle: Any) -> Any:
    return Handle(_floats(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _cast(real: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Builder, source: Handle, target: tl.dtype) -> Handle:
        to_bfloat16 = target.scalar == tl.bfloat16
        if to_bfloat16 and not _is_bfloat16(source):
            return Handle(_bits(source.data.astype(np.float32)), tl.bfloat16)
        return source if to_bfloat16 else real(self, _widened(source), target)

    return cast


def _float_cast(real: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Builder, source: Handle, target: tl.dtype, rounding: Any) -> Handle:
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return self.cast_impl(source, target)
        return real(self, source, target, rounding)

    return cast


def _arithmetic(real: Callable[..., Any]) -> Callable[..., Any]:
    """An operation on bfloat16 numbers: made in float32, then rounded."""

    def operation(self: Builder, *operands: Any) -> Handle:
        if not _is_bfloat16(operands[0]):
            return real(self, *operands)
        result = real(self, *map(_widened, operands))
        if result.data.dtype == np.bool_:
            return result
        return Handle(_bits(result.data), tl.bfloat16)

    return operation


def _product(real: Callable[..., Any]) -> Callable[..., Any]:
    def dot(self: Builder, left: Handle, right: Handle, start: Handle, *options: Any) -> Handle:
        return real(self, _widened(left), _widened(right), start, *options)

    return dot


_patched: set[int] = set()


def _call_inner(self: interpreter.InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """A call from a kernel. Triton patches its language anew in each, which takes milliseconds."""
    languages = {id(tl), id(tl.core)}
    seen = languages.intersection(map(id, self.fn.__globals__.values()))
    if not seen <= _patched:
        interpreter._patch_lang(self.fn)
        _patched.update(seen)
    return self.rewrite()(*args, **kwargs)


_bounds: list[tuple[int, int]] = []


def _on_launch(real: Callable[..., Any]) -> Callable[..., Any]:
    def arguments(self: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        _patched.clear()
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        _bounds[:] = [(part.data_ptr(), part.data_ptr() + part.nbytes()) for part in storages]
        return real(self, args, kwargs)

    return arguments


def _check_bounds(pointers: Handle, mask: Handle) -> None:
    """Raises if an address that is not masked out is of no tensor of the kernel."""
    size = pointers.get_element_ty().primitive_bitwidth // 8
    addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
    known = np.zeros(addresses.shape, bool)
    for start, end in _bounds:
        known |= (addresses >= start) & (addresses + max(size, 1) <= end)
    if not known.all():
        raise IndexError(f"{(~known).sum()} of {known.size} addresses are of no tensor")


def _bounded(real: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
    def access(self: Builder, pointers: Handle, *args: Any) -> Any:
        _check_bounds(pointers, args[mask_at])
        return real(self, pointers, *args)

    return access


def _converted(real: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def convert(arg: Any) -> Any:
        if isinstance(arg, float):
            # Inductor passes numbers in double precision.
            return tl.tensor(Handle(np.array([arg]), tl.float64), tl.float64)
        return real(arg)

    return convert


def _reduced(self: Any, operands: tuple[Any, ...]) -> list[Any]:
    """Any reduction as a tree: pairs of whole slices at once."""
    whole_tensor, dims = self.axis is None, operands[0].handle.data.ndim
    operands, axis = self.unravel(operands, self.axis)
    dtypes = [operand.dtype for operand in operands]
    parts = [np.moveaxis(operand.handle.data, axis, 0) for operand in operands]

    def tensors(start: int, end: int) -> list[Any]:
        return [
            self.to_tensor(np.ascontiguousarray(part[start:end:2]), dtype)
            for part, dtype in zip(parts, dtypes, strict=True)
        ]

    while (count := len(parts[0])) > 1:
        even = count // 2 * 2
        combined = self.combine_fn.fn(*tensors(0, even), *tensors(1, even))
        combined = combined if isinstance(combined, tuple | list | tl.tuple) else (combined,)
        rows = [np.broadcast_to(new.handle.data, (even // 2, *part.shape[1:])).astype(part.dtype)
                for new, part in zip(combined, parts, strict=True)]  # fmt: skip
        parts = [np.concatenate([new, old[even:]]) for new, old in zip(rows, parts, strict=True)]
    results = []
    for (part,), dtype in zip(parts, dtypes, strict=True):
        if self.keep_dims:
            part = part.reshape((1,) * dims) if whole_tensor else np.expand_dims(part, axis)
        elif whole_tensor:
            part = part.item()
        results.append(self.to_tensor(part, dtype))
    return results


def _library(function: Callable[..., Any], dtype: Any = None) -> Callable[..., Any]:
    """A device library's function by numpy's."""

    def call(*args: Any, _semantic: Any = None) -> tl.tensor:
        args = tuple(tl.core._unwrap_if_constexpr(arg) for arg in args)
        like = next(arg for arg in args if isinstance(arg, tl.tensor))
        data = [arg.handle.data if isinstance(arg, tl.tensor) else arg for arg in args]
        scalar = dtype or like.dtype
        result = np.asarray(function(*data)).astype(interpreter._get_np_dtype(scalar))
        shaped = tl.block_type(scalar, list(result.shape)) if like.type.is_block() else scalar
        return tl.tensor(Handle(result, scalar), shaped)

    return call


class _Driver:
    """What Inductor asks of a driver while it loads a kernel."""

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_benchmarker(self) -> Callable[..., Any]:
        raise AssertionError("nothing is timed here")


def _install() -> None:
    Builder.cast_impl = _cast(Builder.cast_impl)
    Builder.create_fp_to_fp = _float_cast(Builder.create_fp_to_fp)
    for name in ("binary_op", "unary_op"):
        setattr(Builder, name, _arithmetic(getattr(Builder, name)))
    Builder.create_dot = _product(Builder.create_dot)
    executor = interpreter.GridExecutor
    executor._init_args_hst = _on_launch(executor._init_args_hst)
    Builder.create_masked_load = _bounded(Builder.create_masked_load, 0)
    Builder.create_masked_store = _bounded(Builder.create_masked_store, 1)
    interpreter.InterpretedFunction.__call__ = _call_inner
    interpreter._implicit_cvt = _converted(interpreter._implicit_cvt)
    interpreter.ReduceOps.generic_reduce = _reduced
    names = (
        "exp",
        "exp2",
        "expm1",
        "log",
        "log2",
        "log1p",
        "sqrt",
        "tanh",
        "floor",
        "ceil",
        "rint",
    )
    triton_helpers.libdevice = SimpleNamespace(
        **{name: _library(getattr(np, name)) for name in names},
        rsqrt=_library(lambda x: 1 / np.sqrt(x)),
        isnan=_library(np.isnan, tl.int32),
        isinf=_library(np.isinf, tl.int32),
        pow=_library(operator.pow),
    )
    triton_helpers.set_driver_to_gpu = lambda: None
    triton.runtime.driver.set_active(_Driver())


_install()


def _widened_config(tuner: Any) -> triton.Config:
    """A kernel of Inductor's in few programs, each takes long: its blocks may have any size."""
    sizes = dict(tuner.configs[0].kwargs)
    if "XBLOCK" in sizes and set(tuner.size_hints) <= {"x", "r0_"}:
        elements = triton.next_power_of_2(tuner.size_hints["x"])
        sizes["XBLOCK"] = max(sizes["XBLOCK"], min(elements, 1024))
    return triton.Config(sizes)


def _loaded(self: AsyncCompile, name: str, source: str, **options: Any) -> SimpleNamespace:
    tuner = getattr(PyCodeCache.load(source), name)

    def run(*args: Any, stream: int) -> None:
        meta = tuner.inductor_meta
        if meta["grid_type"] != "FixedGrid":
            config = _widened_config(tuner)
            args, grid = tuner._interpret_args_grid(args, config)
            tuner.fn[grid](*args, **config.kwargs)
            return
        # A kernel of ours: its grid comes as arguments, what it was specialised on as constants.
        declared = meta["declared_constexpr_names"]
        names = [name for name in tuner.triton_meta["signature"] if name not in declared]
        given = dict(zip(names, args[: len(names)], strict=True))
        tuner.fn[args[len(names) :]](**(given | tuner.triton_meta["constants"]))

    return SimpleNamespace(run=run)


def load(source: str) -> wrapper.Call:
    """``call`` of a generated module, its tensors on the CPU and its kernels interpreted."""
    AsyncCompile.triton = _loaded
    return wrapper.load(source, "cpu")
