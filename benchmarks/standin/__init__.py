"""A GPU that computes nothing, in a process of its own: what is asked of the driver, and what asking costs the host.

Triton compiles its kernels as for an H100 and launches them, as the package does its own, through a driver of this
folder, which remembers the last launch. (Our CUDA sources are not compiled: NVRTC looks into the driver.) Tensors lie
in the CPU's memory. So results mean nothing, and the host's work is all there but what the real driver and the
allocator of GPU memory take.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

SOURCE = Path(__file__).parent / "driver.c"
COMPILER = shutil.which("cc") or shutil.which("gcc")
MULTIPROCESSORS = 132
STREAM = 4096  # the address that stands for torch's current stream
_MOST_ARGUMENTS = 64


class _Launch(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_uint64),
        ("grid", ctypes.c_uint64 * 3),
        ("threads", ctypes.c_uint64),
        ("shared_bytes", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("attribute_count", ctypes.c_uint64),
        ("function", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * _MOST_ARGUMENTS),
        ("argument_count", ctypes.c_uint64),
        ("pushed", ctypes.c_uint64),
        ("popped", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Launch:
    """What the driver was asked for; of each argument, as many low bytes as it has."""

    grid: tuple[int, ...]
    threads: int
    shared_bytes: int
    stream: int
    attribute_count: int
    function: int
    arguments: tuple[int, ...]


class Driver:
    """The driver, loaded in this process under the name of the real one."""

    def __init__(self, folder: Path) -> None:
        path = folder / "libcuda.so.1"
        assert COMPILER is not None, "a C compiler builds the driver; install gcc"
        options = ["-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([COMPILER, *options, "-o", str(path), str(SOURCE)], check=True)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        self.library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.last = _Launch.in_dll(self.library, "standin")

    def launch_of(self, call: Callable[[], object], bytes_of_arguments: list[int]) -> Launch:
        """What `call` launches, which is one kernel with such arguments."""
        before, self.last.argument_count = self.last.count, len(bytes_of_arguments)
        call()
        self.last.argument_count = 0
        assert self.last.count == before + 1, f"expected one launch, got {self.last.count - before}"
        words = (
            word & (1 << 8 * size) - 1 for word, size in zip(self.last.arguments, bytes_of_arguments, strict=False)
        )
        last = self.last
        sizes = last.threads, last.shared_bytes, last.stream, last.attribute_count, last.function
        return Launch(tuple(last.grid), *sizes, tuple(words))


def install(folder: Path) -> Driver:
    """Make this process believe in a GPU, with the driver built in `folder`; nothing undoes it."""
    driver = Driver(folder)
    _stand_in_for_torch()
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver as of_triton

    found = CudaDriver()
    found.get_current_device = lambda: 0
    found.get_current_stream = lambda _: STREAM
    found.get_device_capability = lambda _: (9, 0)
    of_triton.set_active(found)

    from offpath.kernels.gpu import availability, contest, driver as of_offpath

    availability.require = lambda: None
    of_offpath._index = lambda _: 0
    of_offpath.nvrtc.cubin = lambda *_: b"a module"
    contest.problem = lambda _: None
    contest._kept_live_wins = lambda *_: True
    return driver


def _stand_in_for_torch() -> None:
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=MULTIPROCESSORS, L2_cache_size=50 * 2**20)
    torch.cuda.current_device = lambda: 0
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_stream = lambda *_: SimpleNamespace(synchronize=lambda: None)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_properties = lambda *_: properties
    torch._C._cuda_getCurrentRawStream = lambda _: STREAM
    torch.Tensor.get_device = lambda _: 0
    torch.Tensor.is_cuda = True
    torch.Tensor.is_cpu = False


def backend(method: str) -> Any:
    """The GPU's backend, which computes every product of a layer by `method`."""
    from offpath.kernels.gpu.backend import make_backend

    def seconds(product: str, wanted: str, *_: object, **__: object) -> float:
        return 1.0 if wanted == method else 2.0

    costs = SimpleNamespace(layer=seconds, rows=lambda *_: (1.0, 2.0))
    return replace(make_backend(), computes=lambda *_: True, costs=costs)
