"""What the kernels for NVIDIA GPUs need, and what of it is there: each part by itself, so that an error can name it.

Nothing here imports Triton or creates a CUDA context, but for `device_part`, which asks the device for its name.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from offpath.kernels.errors import KernelError
from offpath.kernels.gpu import nvrtc

# The oldest release that the kernels have been run with.
TRITON_FROM = (3, 6)
# What the kernels are compiled for: bfloat16 arithmetic begins with Ampere.
CAPABILITY_FROM = (8, 0)


@dataclass(frozen=True)
class Part:
    """One thing that GPU kernels need: `detail` is its version where it is usable, else what to do about it."""

    name: str
    usable: bool
    detail: str


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on tensors of the CPU: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def torch_part() -> Part:
    """Whether torch was built for CUDA."""
    name, built_for = "CUDA build of torch", torch.version.cuda
    if built_for is None:
        return Part(name, False, f"torch {torch.__version__} was built without CUDA; install a build for CUDA")
    return Part(name, True, f"torch {torch.__version__} for CUDA {built_for}")


def driver_part() -> Part:
    """Whether NVIDIA's driver is there, and new enough for the CUDA that torch was built for."""
    name = "NVIDIA driver"
    try:
        found = ctypes.c_int(0)
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    except OSError:
        return Part(
            name, False, "there is no libcuda.so.1; install NVIDIA's driver, or look at the container's options"
        )
    if status or not found.value:
        return Part(name, False, f"cuDriverGetVersion failed with error {status}; look at nvidia-smi")
    major, minor = found.value // 1000, found.value % 1000 // 10
    built_for = torch.version.cuda
    if built_for and major < int(built_for.split(".")[0]):
        return Part(
            name,
            False,
            f"it is made for CUDA {major}.{minor}, but torch {torch.__version__} needs CUDA {built_for}; update the "
            "driver, or install a torch for its CUDA",
        )
    return Part(name, True, f"for CUDA {major}.{minor}")


def device_part() -> Part:
    """Whether torch sees a device, and whether the kernels are made for it."""
    name = "device"
    if not torch.cuda.is_available():
        return Part(name, False, "torch sees none; look at nvidia-smi and CUDA_VISIBLE_DEVICES")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = properties.major, properties.minor
    if capability < CAPABILITY_FROM:
        wanted = "{}.{}".format(*CAPABILITY_FROM)
        return Part(
            name, False, f"{properties.name} has compute capability {properties.major}.{properties.minor}; the kernels "
            f"need {wanted} (Ampere) or newer"
        )  # fmt: skip
    memory = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
    return Part(name, True, f"{properties.name} (compute capability {properties.major}.{properties.minor}), {memory}")


def triton_part() -> Part:
    """Whether Triton is installed, found without importing it."""
    name, how = "Triton", "install it with: pip install 'offpath[gpu]'"
    if find_spec("triton") is None:
        return Part(name, False, f"it is not installed; {how}")
    found = _version("triton")
    if found is None:
        return Part(name, False, f"there is a module of that name, but no such package; {how}")
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < TRITON_FROM:
        return Part(name, False, f"expected {'.'.join(map(str, TRITON_FROM))} or newer, got {found}; {how}")
    return Part(name, True, f"{found}, interpreted (TRITON_INTERPRET=1)" if interpreted() else found)


def nvrtc_part() -> Part:
    """Whether NVRTC is there, which compiles the kernels of a few tokens when one is first asked for."""
    try:
        library = nvrtc.library()
    except KernelError as error:
        return Part("NVRTC", False, str(error))
    return Part("NVRTC", True, "{}.{}".format(*library.version))


# Each in the order in which one makes sense without the next.
_DEVICE: tuple[Callable[[], Part], ...] = (torch_part, driver_part, device_part)
NEEDED = {"gathers and dense products (Triton)": triton_part, "packed weights, few tokens (NVRTC)": nvrtc_part}


def parts() -> tuple[Part, ...]:
    """Every kind of kernel and what it needs, usable or why not."""
    return *(_kind(*entry) for entry in NEEDED.items()), *(find() for find in (*_DEVICE, triton_part, nvrtc_part))


def problem(needed: Callable[[], Part] = triton_part) -> str | None:
    """Why kernels that need `needed` cannot run on a GPU here, or None; of several reasons the one to mend first."""
    alone = interpreted() and needed is triton_part
    for find in (needed,) if alone else (*_DEVICE, needed):
        part = find()
        if not part.usable:
            return f"{part.name}: {part.detail}"
    return None


def require() -> None:
    """Raise `KernelError`, which names what is missing, unless products can be computed on a GPU here."""
    missing = problem()
    if missing:
        raise KernelError(f"expected a GPU that kernels can run on; {missing}")


def facts(device: int) -> list[object]:
    """What a measurement on a device depends on: the device, its driver, and the versions of what computes there."""
    properties = torch.cuda.get_device_properties(device)
    described = [properties.name, properties.major, properties.minor, properties.multi_processor_count]
    return [*described, driver_part().detail, torch.version.cuda, triton_part().detail]


def _kind(name: str, needed: Callable[[], Part]) -> Part:
    missing = problem(needed)
    return Part(name, missing is None, missing or ("interpreted" if interpreted() else "usable"))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
