"""CUDA kernels on CPU tensors as the PTX that NVRTC makes of them, instructions written by hand included."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from torch import Tensor

import gpu_on_cpu
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
        threads = dict(variant.defines).get("WARPS", gpu_on_cpu.WARPS) * 32
        run(_compiled(variant, self.capability), (*grid, 1), threads, shared_bytes, arguments)


@cache
def _compiled(variant: Variant, capability: int) -> ptx.Program:
    """As `nvrtc.NVRTC.compile`, without the assembler."""
    code = nvrtc.text_of(variant.source)
    if variant.edit is not None:
        assert variant.edit[0] in code, f"{variant.source} does not contain {variant.edit[0]!r}"
        code = code.replace(*variant.edit)
    defines = {"WARPS": gpu_on_cpu.WARPS, "BLOCKS": 1, "PREFETCH": 1} | dict(variant.defines)
    options = [f"--gpu-architecture=compute_{capability}", "--std=c++17", *(f"-D{k}={v}" for k, v in defines.items())]
    library, program = nvrtc.library(), ctypes.c_void_p()
    library._call("nvrtcCreateProgram", ctypes.byref(program), code.encode(), b"kernel.cu", 0, None, None)
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        library._call("nvrtcCompileProgram", program, len(options), given)
        return ptx.parse(library._text(program, "nvrtcGetPTX").decode().rstrip("\0"))
    finally:
        library._functions.nvrtcDestroyProgram(ctypes.byref(program))
