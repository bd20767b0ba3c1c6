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


def this_machine() -> Machine:
    """Describe this process and the machine under it.

    >>> this_machine().threads == torch.get_num_threads()
    True
    """
    backend, reason = kernels.default_backend()
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
        backends=list(kernels.backends()),
        thread_pool=Path(cpu.pool_library()).name,
    )
