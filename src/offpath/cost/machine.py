"""The machine that a number was measured on: no figure means anything without it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from offpath import kernels
from offpath.kernels import cpu
from offpath.kernels.gpu.availability import Part as Part, parts as gpu_parts
from offpath.kernels.measured import processor


@dataclass(frozen=True)
class Machine:
    """What decides how fast this process computes."""

    offpath: str
    torch: str
    python: str
    system: str
    processor: str
    logical_cores: int
    threads: int
    backend: str
    backend_reason: str
    isas: dict[str, bool]
    backends: list[str]
    thread_pool: str
    gpu: str = ""  # what computes, where that is no CPU


def this_machine(device: str = "cpu") -> Machine:
    """Describe this process and the machine under it, as it computes on `device`.

    >>> this_machine().threads == torch.get_num_threads()
    True
    """
    on_gpu = torch.device(device).type == "cuda"
    backend, reason = kernels.default_backend("cuda" if on_gpu else "cpu")
    return Machine(
        offpath=version("offpath"),
        torch=torch.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        processor=processor(),
        logical_cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        backend=backend.name,
        backend_reason=reason,
        isas=cpu.isas(),
        backends=list(kernels.backends() | (kernels.backends("cuda") if on_gpu else {})),
        thread_pool=Path(cpu.pool_library()).name,
        gpu="; ".join(f"{part.name} {part.detail}" for part in gpu_parts()) if on_gpu else "",
    )
