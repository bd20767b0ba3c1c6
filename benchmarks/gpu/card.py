"""The GPU that a number was measured on, and what is missing where there is none."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from gpu.rivals import sparsify_version
from offpath.kernels import KernelError
from offpath.kernels.gpu import availability, nvrtc

SMI = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")


def missing() -> str | None:
    """Why nothing can be measured here, or None."""
    return availability.problem()


def describe() -> dict[str, Any]:
    """The card, its driver and every version that decides how fast it is."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "nvrtc": _nvrtc(),
        "offpath": version("offpath"),
        "eai-sparsify": sparsify_version(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
            **_smi(f"GPU-{properties.uuid}"),
        }
    return found


def line(card: dict[str, Any]) -> str:
    """The card in the words that stand above every table of times."""
    if "name" not in card:
        return f"no GPU: Triton {card['triton']} in its interpreter, torch {card['torch']}"
    return (
        f"{card['name']} (compute capability {card['capability']}, {card['multiprocessors']} multiprocessors, "
        f"{card['memory_bytes'] / 2**30:.0f} GiB, {card['l2_bytes'] / 2**20:.0f} MiB of L2), "
        f"driver {card.get('driver_version', 'unknown')}, torch {card['torch']}, Triton {card['triton']}, "
        f"NVRTC {card['nvrtc']}"
    )


def _smi(uuid: str) -> dict[str, str]:
    # By its uuid: the tool does not count the devices as CUDA_VISIBLE_DEVICES has torch do.
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    said = run.stdout.strip().split(", ")
    return dict(zip(SMI, said, strict=True)) if len(said) == len(SMI) else {}


def _nvrtc() -> str | None:
    try:
        return ".".join(map(str, nvrtc.library().version))
    except KernelError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
