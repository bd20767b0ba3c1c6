"""Launches kernels on CPU tensors as the PTX that they are compiled to, in place of Triton's interpreter.

A plugin of pytest: with `-p compiled_on_cpu`, the tests that are made for the interpreter run what a GPU would run. It
also sees what the interpreter cannot: threads of one program, their shared memory and barriers, and numbers rounded by
the instructions. CUDA kernels are launched as in `compiled_cuda.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from triton.runtime.jit import mangle_type

import gpu_on_cpu
import ptx
from compiled_cuda import CompiledPrograms
from machine_code import made_for
from offpath.kernels.gpu import availability, launch
from ptx_run import run

_programs: dict[tuple[object, ...], tuple[ptx.Program, int]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--capability", type=int, default=90, help="the GPU's, for which kernels are compiled")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    CompiledPrograms.capability = early_config.known_args_namespace.capability
    gpu_on_cpu.Programs = CompiledPrograms
    availability.interpreted = lambda: True
    launch.INTERPRETED = True
    launch._launch_by_triton = run_compiled


def run_compiled(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Tensor | int, ...],
    constants: dict[str, Any],
    options: dict[str, int],
) -> None:
    """In place of `launch._launch_by_triton`: compiled anew for the same arguments as Triton does it for."""
    signature: dict[str, str] = {}
    compiled_in = dict(constants)
    attributes = {}
    for i, (name, given) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(given, int) and given == 1:
            compiled_in[name] = 1
            continue
        signature[name] = mangle_type(given)
        if (given if isinstance(given, int) else given.data_ptr()) % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    key = (kernel.fn, *signature.items(), *attributes, *compiled_in.items(), *options.items())
    if key not in _programs:
        made = made_for(CompiledPrograms.capability, kernel, signature, compiled_in, attributes, **options)
        _programs[key] = ptx.parse(made.asm["ptx"]), made.metadata.shared
    program, shared_bytes = _programs[key]
    given = [one for name, one in zip(kernel.arg_names, arguments, strict=False) if name in signature]
    sizes = (*grid, 1, 1)[:3]
    if 0 not in sizes:
        run(program, sizes, options["num_warps"] * 32, shared_bytes, given)
