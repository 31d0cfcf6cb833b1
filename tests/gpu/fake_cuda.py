"""A CUDA GPU that is not there: enough of one for Inductor to generate code for it.

All names that this file patches are private to torch and Triton, and were read off torch 2.13.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._dynamo import device_interface
from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver


@dataclass(frozen=True)
class Spec:
    """What a data sheet says of a GPU; Inductor chooses block sizes by it."""

    name: str
    multiprocessors: int
    # Of one block, in bytes: what a kernel may ask for at most.
    shared_memory: int
    l2_bytes: int
    memory_bytes: int


SPECS = {
    80: Spec("NVIDIA A100-SXM4-80GB", 108, 166912, 40 << 20, 80 << 30),
    90: Spec("NVIDIA H100 80GB HBM3", 132, 232448, 50 << 20, 80 << 30),
    100: Spec("NVIDIA B200", 148, 232448, 126 << 20, 180 << 30),
}


def _properties(cc: int) -> SimpleNamespace:
    """Looks like what ``torch.cuda.get_device_properties`` returns."""
    spec = SPECS[cc]
    return SimpleNamespace(
        name=spec.name,
        major=cc // 10,
        minor=cc % 10,
        multi_processor_count=spec.multiprocessors,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=spec.memory_bytes,
        L2_cache_size=spec.l2_bytes,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=spec.shared_memory,
        shared_memory_per_multiprocessor=spec.shared_memory + 1024,
        gcnArchName="",
        is_integrated=0,
        is_multi_gpu_board=0,
    )


@functools.cache
def _load_device_guard() -> None:
    if torch.version.cuda is not None:
        return
    root, source = Path(torch.__file__).parent, Path(__file__).with_name("fake_cuda_guard.cpp")
    library = Path(tempfile.gettempdir(), f"fake_cuda_guard-{torch.__version__}-{os.getuid()}.so")
    if not library.exists():
        # Renamed when it is whole: another process may be looking for it.
        part = library.with_suffix(f".{os.getpid()}")
        flags = ["-O1", "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib"]
        subprocess.run(["g++", *flags, str(source), "-lc10", "-o", str(part)], check=True)
        part.rename(library)
    ctypes.CDLL(str(library))


def _driver(cc: int) -> CudaDriver:
    """Triton's driver as far as compiling needs it: it knows the target and launches nothing."""

    class Driver(CudaDriver):
        def __init__(self) -> None:
            limits = {
                "max_shared_mem": SPECS[cc].shared_memory,
                "multiprocessor_count": SPECS[cc].multiprocessors,
                "warpSize": 32,
            }
            self.utils = SimpleNamespace(get_device_properties=lambda device: limits)
            self.get_device_capability = lambda device=0: (cc // 10, cc % 10)
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device=0: 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", cc, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

    return Driver()


class _NoDevice:
    """In place of ``torch.cuda.device``."""

    def __init__(self, device: Any = None) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def _interface(properties: SimpleNamespace) -> type:
    """What Dynamo and Inductor ask about a device."""

    class Interface(device_interface.CudaInterface):
        device = _NoDevice
        get_device_properties = staticmethod(lambda device=None: properties)
        current_device = staticmethod(lambda: 0)
        device_count = staticmethod(lambda: 1)
        is_available = staticmethod(lambda: True)
        synchronize = staticmethod(lambda device=None: None)
        get_raw_stream = staticmethod(lambda device=0: 0)
        set_device = staticmethod(lambda device: None)
        exchange_device = staticmethod(lambda device: 0)
        maybe_exchange_device = staticmethod(lambda device: 0)
        is_bf16_supported = staticmethod(lambda including_emulation=True: True)
        memory_allocated = staticmethod(lambda device=None: 0)

        class Worker(device_interface.CudaInterface.Worker):
            current_device = staticmethod(lambda: 0)
            get_device_properties = staticmethod(lambda device=None: properties)

    return Interface


class _CudaOnCpu(TorchDispatchMode):
    """Makes on the CPU what is asked for on CUDA: Inductor folds constants on real tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def moved(value: Any) -> Any:
            cuda = isinstance(value, torch.device) and value.type == "cuda"
            return torch.device("cpu") if cuda else value

        kwargs = {name: moved(value) for name, value in (kwargs or {}).items()}
        return func(*map(moved, args), **kwargs)


def _on_cpu(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _CudaOnCpu():
            return method(*args, **kwargs)

    return wrapper


def _patches(cc: int, properties: SimpleNamespace) -> Iterator[Any]:
    """All patches but the registries', as context managers."""
    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (cc // 10, cc % 10),
        "get_device_name": lambda device=None: properties.name,
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *args, **kwargs: None,
        "synchronize": lambda device=None: None,
        "_lazy_init": lambda: None,
        "device": _NoDevice,
    }
    for name, value in cuda.items():
        yield mock.patch.object(torch.cuda, name, value)
    # torch.tensor(.., device="cuda") stays fake.
    yield mock.patch.object(FakeTensorMode, "avoid_device_init", property(lambda self: True))
    for name in ("__init__", "run"):
        method = getattr(UniformValueConstantFolder, name)
        yield mock.patch.object(UniformValueConstantFolder, name, _on_cpu(method))


def _forget_devices() -> None:
    """Clears what is cached of the machine's devices."""
    import torch._inductor.codecache as codecache
    import torch._inductor.utils as inductor_utils
    import torch.utils._triton as triton_utils
    from torch._inductor.runtime.hints import DeviceProperties

    for module in (triton_utils, inductor_utils):
        for function in vars(module).values():
            if callable(getattr(function, "cache_clear", None)):
                function.cache_clear()
    codecache.CacheBase.get_system.cache_clear()
    DeviceProperties.create.__func__.cache_clear()
    device_interface.caching_worker_device_properties.clear()
    device_interface.caching_worker_current_devices.clear()


@contextlib.contextmanager
def fake_cuda(cc: int) -> Iterator[None]:
    """Makes torch, Inductor and Triton find one GPU of compute capability ``cc``.

    Tensors on it must be fake. Nothing can be launched, timed or copied.
    """
    _load_device_guard()
    properties = _properties(cc)
    device_interface.get_interface_for_device("cpu")  # registers the real ones, once
    interfaces, driver = dict(device_interface.device_interfaces), triton.runtime.driver._active
    with contextlib.ExitStack() as stack:
        for patch in _patches(cc, properties):
            stack.enter_context(patch)
        for name in ("cuda", "cuda:0"):
            device_interface.register_interface_for_device(name, _interface(properties))
        triton.runtime.driver.set_active(_driver(cc))
        _forget_devices()
        try:
            yield
        finally:
            device_interface.device_interfaces.clear()
            device_interface.device_interfaces.update(interfaces)
            triton.runtime.driver._active = driver
            _forget_devices()
