"""Which backend computes: chosen by device and dtype, or forced, but never swapped for another one in silence.

`OFFPATH_BACKEND` (`reference`, `cpu`) and `OFFPATH_ISA` (`baseline`, `avx2`, `avx512`, `avx512bf16`) force a choice for
the whole process. A forced choice that cannot be met raises.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from offpath.kernels import cpu, reference
from offpath.kernels.backend import Backend, KernelError

_forced: list[Backend] = []


@cache
def backends() -> dict[str, Backend]:
    """Every backend that runs on this machine, by name; the reference first, then the ISAs from slow to fast.

    >>> list(backends())[0]
    'reference'
    """
    found = [reference.BACKEND]
    found += [cpu.make_backend(isa) for isa, runs_here in cpu.isas().items() if runs_here]
    return {backend.name: backend for backend in found}


@cache
def default_backend() -> tuple[Backend, str]:
    """The backend of this process, and why it is the one.

    Raises `KernelError` when `OFFPATH_BACKEND` or `OFFPATH_ISA` asks for what this machine cannot do.
    """
    wanted, isa = os.environ.get("OFFPATH_BACKEND"), os.environ.get("OFFPATH_ISA")
    if wanted not in (None, "", "cpu", "reference"):
        raise KernelError(f"expected OFFPATH_BACKEND to be 'cpu' or 'reference', got {wanted!r}")
    if wanted == "reference":
        if isa:
            raise KernelError(f"OFFPATH_BACKEND=reference has no ISA, but OFFPATH_ISA={isa} asks for one; unset one")
        return reference.BACKEND, "forced by OFFPATH_BACKEND"
    if isa:
        return cpu.make_backend(isa), "forced by OFFPATH_ISA"
    return backends()[f"cpu:{cpu.best_isa()}"], "the fastest that this CPU runs"


def select(device_type: str, dtype: torch.dtype) -> Backend:
    """The backend for tensors of `dtype` on `device_type`.

    Raises `KernelError` when it has no kernels for them: there is no silent fallback to a slower one.
    """
    backend = _forced[-1] if _forced else default_backend()[0]
    if not backend.computes(device_type, dtype):
        raise KernelError(
            f"backend {backend.name!r} has no kernels for {dtype} on {device_type!r} "
            "(the CPU kernels compute float32, float64 and bfloat16); cast the module with .float(), move it with "
            ".cpu(), or set OFFPATH_BACKEND=reference for the slow definition in plain torch"
        )
    return backend


@contextmanager
def forced(backend: str | Backend) -> Iterator[Backend]:
    """Compute everything in the process with one backend while the block runs, by name or as an object.

    >>> with forced("reference") as backend:
    ...     select("cpu", torch.bfloat16).name
    'reference'
    """
    if isinstance(backend, str):
        if backend not in backends():
            raise KernelError(f"expected one of {', '.join(backends())}, got {backend!r}")
        backend = backends()[backend]
    _forced.append(backend)
    try:
        yield backend
    finally:
        _forced.remove(backend)
