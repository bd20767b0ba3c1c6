"""What every Triton kernel's launcher asks of its tensors, and how it is launched, where its tensors are."""

from __future__ import annotations

import os
from subprocess import CalledProcessError
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from offpath.kernels.errors import KernelError
from offpath.kernels.reference_rows import check_rows

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Read when Triton was imported: then kernels run in Python, on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DEBUG = os.environ.get("TRITON_DEBUG") == "1"
_LANES = 32
_MOST_INT32 = 2**31 - 1
_MOST_ENTRIES = _MOST_INT32 - 2048  # a loop over the last ones, a block at a time, ends behind them
# Of Triton, whose rules of what it makes another kernel for are these: others are asked in every launch.
_REMEMBERED = triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"], ["3", "8"])
# Keyed by all that Triton makes another kernel for: its own look-up costs the host more than most products do a GPU.
_compiled: dict[tuple[object, ...], CompiledKernel] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    first: Tensor,
    *others: Tensor | int,
    num_warps: int,
    num_stages: int = 1,
    **constants: Any,
) -> None:
    """Run a Triton kernel on the device of its first argument; `constants` stand in the kernel's order.

    Returns at once, and may be captured in a graph once it has run with such arguments.
    """
    arguments, options = (first, *others), {"num_warps": num_warps, "num_stages": num_stages}
    device = first.get_device()  # -1 where Triton interprets
    if device >= 0 and device != torch.cuda.current_device():  # where Triton launches, whatever its arguments say
        with torch.cuda.device(device):
            launch(kernel, grid, first, *others, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    if device < 0 or not _REMEMBERED:
        _launch_by_triton(kernel, grid, arguments, constants, options)
        return
    key: list[object] = [kernel.fn, device, num_warps, num_stages, *constants.values()]
    values = []
    for argument in arguments:
        if isinstance(argument, int):
            value = argument
        else:
            key.append(argument.dtype)
            value = argument.data_ptr()
        values.append(value)
        key.append(2 if value == 1 else (value & 15 == 0) + (value > _MOST_INT32) * 4)
    found = _compiled.get(tuple(key))
    if found is not None:
        found[(*grid, 1, 1)[:3]](*values, *constants.values())
        return
    made = _launch_by_triton(kernel, grid, arguments, constants, options)
    if isinstance(made, CompiledKernel):  # and not what Triton returns instead where one of its hooks says so
        _compiled[tuple(key)] = made


def _launch_by_triton(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Tensor | int, ...],
    constants: dict[str, Any],
    options: dict[str, int],
) -> object:
    assert kernel.arg_names[len(arguments) :] == list(constants), "a compiled kernel takes its arguments by place"
    try:
        return kernel[grid](*arguments, **constants, **options)
    except (RuntimeError, CalledProcessError) as error:
        if isinstance(error, CalledProcessError) or "C compiler" in str(error):
            raise KernelError(
                "expected a C compiler and Python's headers, with which Triton builds its launcher once on a machine; "
                f"install gcc and python3-dev, or name a compiler in CC ({error})"
            ) from error
        raise


def expect_operands(**given: Tensor) -> None:
    """Raises `KernelError` unless all are dense, of one supported dtype, and on one device that runs the kernels."""
    first = next(iter(given.values()))
    dtype, device = first.dtype, first.device
    for one in given.values():  # a generator expression would take the host twice as long
        if one.dtype is not dtype or one.device != device or one.layout is not torch.strided:
            break
    else:
        if dtype in DTYPES and (first.is_cuda or (INTERPRETED and first.is_cpu)):
            return
    raise KernelError(
        "expected dense operands of one dtype among float32, float64 and bfloat16 on one CUDA device "
        f"(CPU tensors where TRITON_INTERPRET=1 was set before Triton was imported); got {described(**given)}. "
        "Cast or move the module or its input so that all agree"
    )


def expect_indices(like: Tensor, **given: Tensor) -> None:
    """Raises `KernelError` unless all are int32 vectors on the device of `like`."""
    device = like.device
    for one in given.values():
        if one.dtype is not torch.int32 or one.dim() != 1 or one.device != device:
            raise KernelError(f"expected int32 vectors on {device}, got {described(**given)}")


def expect_shapes(fit: bool, **given: Tensor) -> None:
    """Raises `KernelError` unless the shapes fit one another."""
    if not fit:
        raise KernelError(f"expected operands whose shapes fit, got {described(**given)}")


def expect_rows(crow_indices: Tensor, indices: Tensor, columns: int) -> None:
    """Raises `KernelError` for rows that no kernel may follow, where looking costs no wait for the device.

    On a GPU, the contents are looked at under `TRITON_DEBUG=1` alone; without it, no kernel reads outside its
    operands: an entry out of range, or of a row that does not begin where it should, makes what it would add to NaN.
    """
    if crow_indices.shape[0] == 0 or (indices.shape[0] > 0 and (columns == 0 or crow_indices.shape[0] == 1)):
        raise KernelError(
            f"expected crow_indices [rows + 1], a row for entries, and indices in [0, {columns}), "
            f"got {described(crow_indices=crow_indices, indices=indices)}"
        )
    if indices.shape[0] > _MOST_ENTRIES:
        raise KernelError(f"expected at most {_MOST_ENTRIES:,} entries, got {indices.shape[0]:,}; split the batch")
    if _DEBUG or not indices.is_cuda:
        check_rows(crow_indices, indices, columns)


def described(**given: Tensor) -> str:
    return ", ".join(f"{name} {t.dtype} {tuple(t.shape)} on {t.device}" for name, t in given.items())


def accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype is torch.float64 else tl.float32


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def contiguous_rows(matrix: Tensor) -> Tensor:
    """`matrix`, or a copy where its rows are not contiguous or overlap."""
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


def block_of(width: int, most: int) -> int:
    """How many of `width` neighbours one program takes: a power of two up to `most`, at least one for each lane."""
    return max(min(power_of_two_from(width), most), _LANES)


def blocks_of(width: int, block: int) -> int:
    """How many blocks cover `width`; raises `KernelError` where a grid cannot have so many in its second dimension."""
    blocks = parts_of(width, block)
    if blocks > 65535:
        raise KernelError(
            f"expected at most {65535 * block} neighbours (tokens, or the width), got {width}; split them"
        )
    return blocks


def parts_of(whole: int, part: int) -> int:
    """How many parts cover the whole; `triton.cdiv` is for kernels, and costs the host as much as a launch."""
    return -(-whole // part)


def power_of_two_from(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(number - 1, 0).bit_length()
