"""CUDA kernels on CPU tensors as the PTX that NVRTC makes of them, instructions written by hand included."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from torch import Tensor

import ptx
from gpu_on_cpu import Variant
from offpath.kernels.gpu import nvrtc
from ptx_run import run


class CompiledPrograms:
    """In place of `gpu_on_cpu.Programs`, which runs the sources on a stand-in for what C++ has no word for."""

    capability = 90

    def __init__(self, path: Path, variants: list[Variant], checker: str = "memory") -> None:
        pass

    def run(
        self,
        variant: Variant,
        grid: tuple[int, int],
        shared_bytes: int,
        *arguments: Tensor | int | None,
        backwards: bool = False,
    ) -> None:
        """One launch, all of whose threads go forward together, `backwards` or not."""
        code = _compiled(variant, self.capability)
        run(code, (*grid, 1), variant.names["WARPS"] * 32, shared_bytes, arguments)


class _ToPtx(nvrtc.NVRTC):
    """NVRTC without its assembler."""

    def _text(self, program: ctypes.c_void_p, getter: str) -> bytes:
        return super()._text(program, getter.replace("CUBIN", "PTX"))


@cache
def _library() -> _ToPtx:
    return _ToPtx(nvrtc.library().path)


@cache
def _compiled(variant: Variant, capability: int) -> ptx.Program:
    defines = variant.names | {"PREFETCH": 1}
    options = [f"--gpu-architecture=compute_{capability}", "--std=c++17", *(f"-D{k}={v}" for k, v in defines.items())]
    return ptx.parse(_library().compile(variant.edited, variant.source, options).decode().rstrip("\0"))
