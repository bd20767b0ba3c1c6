"""Which backend computes: chosen by device and dtype, or forced, but never swapped for another one in silence.

`OFFPATH_BACKEND` (`reference`, `cpu`, `gpu`) and `OFFPATH_ISA` (`baseline`, `avx2`, `avx512`, `avx512bf16`,
`avx512amx`; on AArch64 `neon`, `neonbf16`) force a choice for the whole process. A forced choice that cannot be met
raises. Without one, CPU tensors are computed by the fastest variant that the CPU runs and CUDA tensors by the GPU's
kernels, which nothing else loads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module

import torch

from offpath.kernels import cpu, reference
from offpath.kernels.backend import Backend, KernelError
from offpath.kernels.gpu import availability

CHOICES = ("cpu", "gpu", "reference")
_forced: list[Backend] = []
_defaults: dict[str, tuple[Backend, str]] = {}


@cache
def backends(device_type: str = "cpu") -> dict[str, Backend]:
    """Every backend for tensors of a device that runs on this machine, by name; the reference first, then the CPU's
    ISAs from slow to fast, then the GPU's (for CPU tensors, where Triton interprets it).

    >>> list(backends())[0]
    'reference'
    """
    found = [reference.BACKEND]
    if device_type == "cpu":
        found += [cpu.make_backend(isa) for isa, runs_here in cpu.isas().items() if runs_here]
    if device_type == ("cpu" if availability.interpreted() else "cuda") and availability.problem() is None:
        found.append(_gpu())
    return {backend.name: backend for backend in found}


def default_backend(device_type: str = "cpu") -> tuple[Backend, str]:
    """The backend of this process for tensors of a device, and why it is the one.

    Raises `KernelError` when `OFFPATH_BACKEND` or `OFFPATH_ISA` asks for what this machine cannot do, and for CUDA
    tensors where something that the GPU's kernels need is missing.
    """
    found = _defaults.get(device_type)  # not @cache, of which torch.compile warns whoever compiles a loss
    if found is None:
        found = _defaults[device_type] = _chosen(device_type)
    return found


def _chosen(device_type: str) -> tuple[Backend, str]:
    wanted, isa = os.environ.get("OFFPATH_BACKEND"), os.environ.get("OFFPATH_ISA")
    if wanted not in (None, "", *CHOICES):
        raise KernelError(f"expected OFFPATH_BACKEND to be one of {', '.join(CHOICES)}, got {wanted!r}")
    if isa and wanted in ("reference", "gpu"):
        raise KernelError(f"OFFPATH_BACKEND={wanted} has no ISA, but OFFPATH_ISA={isa} asks for one; unset one")
    if wanted == "reference":
        return reference.BACKEND, "forced by OFFPATH_BACKEND"
    if wanted == "gpu":
        return _gpu(), "forced by OFFPATH_BACKEND"
    if device_type == "cuda" and wanted != "cpu":
        return _gpu(), "the kernels for CUDA tensors"
    if isa:
        return cpu.make_backend(isa), "forced by OFFPATH_ISA"
    return cpu.make_backend(cpu.best_isa()), "the fastest that this CPU runs"


def select(device_type: str, dtype: torch.dtype) -> Backend:
    """The backend for tensors of `dtype` on `device_type`.

    Raises `KernelError` when it has no kernels for them: there is no silent fallback to a slower one.
    """
    backend = _forced[-1] if _forced else default_backend(device_type)[0]
    if not backend.computes(device_type, dtype):
        raise KernelError(
            f"backend {backend.name!r} has no kernels for {dtype} on {device_type!r} (those of the CPU and of CUDA "
            "devices compute float32, float64 and bfloat16); cast the module with .float(), move it with .cpu() or "
            ".cuda(), or set OFFPATH_BACKEND=reference for the slow definition in plain torch"
        )
    return backend


@cache
def _gpu() -> Backend:
    """Made late: it imports Triton. Raises `KernelError`, which names what is missing."""
    availability.require()
    backend: Backend = import_module("offpath.kernels.gpu.backend").make_backend()
    return backend


@contextmanager
def forced(backend: str | Backend) -> Iterator[Backend]:
    """Compute everything in the process with one backend while the block runs, by name or as an object.

    >>> with forced("reference") as backend:
    ...     select("cpu", torch.bfloat16).name
    'reference'
    """
    if isinstance(backend, str):
        if backend == "gpu":
            availability.require()
        known = backends() | backends("cuda")
        if backend not in known:
            raise KernelError(f"expected one of {', '.join(known)}, got {backend!r}")
        backend = known[backend]
    _forced.append(backend)
    try:
        yield backend
    finally:
        _forced.remove(backend)
