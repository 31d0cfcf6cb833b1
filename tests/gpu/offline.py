"""Compiles Inductor's kernels to machine code without a GPU: Triton brings its own assembler."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Any
from unittest import mock

import triton
from gpu.codegen import Kernel
from gpu.fake_cuda import SPECS
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Usage:
    """What a kernel takes of a GPU.

    Attributes:
        registers: of each thread.
        spilled: bytes of each thread that did not fit into registers, loads and stores.
        shared: bytes of shared memory of each block.
        warps: of each block.
    """

    registers: int
    spilled: int
    shared: int
    warps: int


def shared_memory_limit(cc: int) -> int:
    """Bytes that a block may ask for. Triton compiles a kernel that asks for more, too."""
    return SPECS[cc].shared_memory


def usage_of(kernel: Kernel, cc: int) -> Usage:
    """Compiles the first configuration of a kernel for compute capability ``cc``."""
    # The module would look for a driver as it loads.
    with mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None):
        tuner = getattr(PyCodeCache.load(kernel.source), kernel.name)
    meta = tuner._create_compile_meta(tuner.configs[0])
    source = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
    options = tuner._create_compile_options(tuner.configs[0], meta)
    return _compiled(source, cc, options)


def _compiled(source: ASTSource, cc: int, options: dict[str, Any]) -> Usage:
    # Only the assembler's log tells of spills, and a cached kernel brings no log.
    with (
        mock.patch.object(triton.knobs.nvidia, "dump_ptxas_log", True),
        mock.patch.object(triton.knobs.compilation, "always_compile", True),
        contextlib.redirect_stdout(io.StringIO()) as log,
    ):
        kernel = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    assert kernel.asm["cubin"]

    def read(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, log.getvalue())))

    assert "bytes spill stores" in log.getvalue()
    spilled = read(r"(\d+) bytes spill stores") + read(r"(\d+) bytes spill loads")
    registers = read(r"Used (\d+) registers")
    return Usage(registers, spilled, kernel.metadata.shared, kernel.metadata.num_warps)
