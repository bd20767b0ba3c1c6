"""Compiled CUDA kernels on torch's device, in torch's context, on torch's current stream."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from functools import cache

import torch

from offpath.kernels.errors import KernelError
from offpath.kernels.gpu import nvrtc

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_OVERLAP_IN_GRAPHS_FROM = 12030  # CUDA 12.3
_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_BYTES_LIMIT = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_RESERVED_SHARED_BYTES = 111  # CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK
_STATIC_SHARED_BYTES = 1  # CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, with room for the largest value that it may hold."""

    _fields_ = (("id", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


# The kernel may start while the one before it in the stream still runs: it waits for that one's end itself.
_OVERLAP = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
# CUlaunchConfig: grid, block, shared memory, stream, attributes and their number.
_CONFIG = struct.Struct("7I4xQQI4x")


@dataclass(frozen=True, eq=False)
class Kernel:
    """One function of a loaded module."""

    function: ctypes.c_void_p
    context: ctypes.c_void_p
    device: int
    multiprocessors: int
    overlaps: bool

    def launch(self, grid: tuple[int, int], threads: int, shared_bytes: int, *arguments: int) -> None:
        """Run on torch's current stream of the kernel's device; returns at once, and may be captured in a graph.

        `arguments` are addresses, and ints that are not negative.
        """
        # Each argument lies in 8 bytes of its own: the lower 4 of them are the int, where the kernel takes one. Behind
        # them lie their addresses. One buffer for both takes the host half as long as two arrays of ctypes.
        count = len(arguments)
        buffer = ctypes.create_string_buffer(16 * count)
        first = ctypes.addressof(buffer)
        places = first + 8 * count
        _words(2 * count).pack_into(buffer, 0, *arguments, *range(first, places, 8))
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        attributes = ctypes.addressof(_OVERLAP)
        config = _CONFIG.pack(*grid, 1, threads, 1, 1, shared_bytes, stream, attributes, self.overlaps)
        with _current(self.context):
            _call("cuLaunchKernelEx", config, self.function, ctypes.c_void_p(places), None)

    def resident_blocks(self, threads: int, shared_bytes: int) -> int:
        """How many blocks the whole GPU holds at a time."""
        blocks = ctypes.c_int()
        with _current(self.context):
            _call(
                "cuOccupancyMaxActiveBlocksPerMultiprocessor",
                ctypes.byref(blocks),
                self.function,
                threads,
                ctypes.c_size_t(shared_bytes),
            )
        return max(blocks.value, 1) * self.multiprocessors


@cache
def _words(count: int) -> struct.Struct:
    return struct.Struct(f"{count}Q")


def load(source: str, name: str, device: torch.device, **defines: int) -> Kernel:
    """The function `name` of a file in cuda/, compiled for `device` and loaded there; kept for the next call.

    Raises `KernelError` without an NVIDIA GPU, its driver or NVRTC, when the driver is older than NVRTC's code, when
    the source does not compile, and when it would have to be loaded in the middle of a graph's capture; torch's
    `OutOfMemoryError` where the GPU has no room for it.
    """
    return _load(source, name, _index(device), tuple(sorted(defines.items())))


def shared_bytes_limit(device: torch.device) -> int:
    """How much shared memory a block may ask for there, beside what the driver reserves in it."""
    index = _index(device)
    return _attribute(index, _SHARED_BYTES_LIMIT) - _attribute(index, _RESERVED_SHARED_BYTES)


def _index(device: torch.device) -> int:
    if device.type != "cuda" or torch.version.hip is not None:
        raise KernelError(f"expected tensors on an NVIDIA GPU, got {device}. Move the module and its input there")
    return torch.cuda.current_device() if device.index is None else device.index


@cache
def _load(source: str, name: str, index: int, defines: tuple[tuple[str, int], ...]) -> Kernel:
    if torch.cuda.is_current_stream_capturing():
        raise KernelError(
            f"{source} is not loaded yet, and a graph is being captured. Run the product once before that"
        )
    driver()
    properties = torch.cuda.get_device_properties(index)
    code = nvrtc.cubin(source, (properties.major, properties.minor), dict(defines))
    torch.cuda.synchronize(index)  # makes sure that torch's context exists
    context, module, function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    handle = ctypes.c_int()
    _call("cuDeviceGet", ctypes.byref(handle), index)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
    with _current(context):
        try:
            _call("cuModuleLoadData", ctypes.byref(module), code)
        except torch.OutOfMemoryError:  # the driver takes memory beside torch, which keeps what tensors gave back
            torch.cuda.empty_cache()
            _call("cuModuleLoadData", ctypes.byref(module), code)
        _call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        static = ctypes.c_int()
        _call("cuFuncGetAttribute", ctypes.byref(static), _STATIC_SHARED_BYTES, function)
        # What the driver reserves is among the kernel's own where NVRTC 13 compiles for 9.0 or later, and not for 8.0.
        own = max(static.value, _attribute(index, _RESERVED_SHARED_BYTES))
        most = _attribute(index, _SHARED_BYTES_LIMIT) - own
        _call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED_BYTES, most)
    version = ctypes.c_int()
    _call("cuDriverGetVersion", ctypes.byref(version))
    overlaps = properties.major >= 9 and version.value >= _OVERLAP_IN_GRAPHS_FROM
    return Kernel(function, context, index, properties.multi_processor_count, overlaps)


@cache
def _attribute(index: int, number: int) -> int:
    handle, value = ctypes.c_int(), ctypes.c_int()
    _call("cuDeviceGet", ctypes.byref(handle), index)
    _call("cuDeviceGetAttribute", ctypes.byref(value), number, handle)
    return value.value


@cache
def driver() -> ctypes.CDLL:
    """libcuda; raises `KernelError` where it is missing or older than the code that NVRTC writes."""
    try:
        functions = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelError(f"no NVIDIA driver: {error}. Install the driver of the GPU") from error
    version = ctypes.c_int()
    if functions.cuInit(0) or functions.cuDriverGetVersion(ctypes.byref(version)):
        raise KernelError("the NVIDIA driver is there but finds no GPU that it can use; nvidia-smi says why")
    # Code of one major version runs on every driver of the same one.
    made_for = nvrtc.library().version
    if version.value // 1000 < made_for[0]:
        raise KernelError(
            f"the NVIDIA driver knows CUDA up to {version.value // 1000}.{version.value % 1000 // 10}, and NVRTC "
            f"{made_for[0]}.{made_for[1]} writes code for {made_for[0]}.0 and later. Update the driver, or install an "
            f"NVRTC of its version"
        )
    return functions


class _current:
    """A context that is this thread's inside the block."""

    def __init__(self, context: ctypes.c_void_p) -> None:
        self.context = context

    def __enter__(self) -> None:
        now = ctypes.c_void_p()
        _call("cuCtxGetCurrent", ctypes.byref(now))
        self.pushed = now.value != self.context.value
        if self.pushed:
            _call("cuCtxPushCurrent_v2", self.context)

    def __exit__(self, *_: object) -> None:
        if self.pushed:
            _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


def _call(name: str, *arguments: object) -> None:
    functions = driver()
    status = getattr(functions, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        functions.cuGetErrorString(status, ctypes.byref(text))
        message = f"{name} failed: {(text.value or b'unknown error').decode()} ({status})"
        raise torch.OutOfMemoryError(message) if status == _OUT_OF_MEMORY else KernelError(message)
