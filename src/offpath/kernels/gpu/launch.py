"""What every Triton kernel's launcher asks of its tensors, and where it runs."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from offpath.kernels.errors import KernelError
from offpath.kernels.reference_rows import check_rows

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Read when Triton was imported: then kernels run in Python, on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DEBUG = os.environ.get("TRITON_DEBUG") == "1"
_LANES = 32


def expect_operands(**given: Tensor) -> None:
    """Raises `KernelError` unless all are dense, of one supported dtype, and on one device that runs the kernels."""
    first = next(iter(given.values()))
    if all(
        t.dtype is first.dtype and t.dtype in DTYPES and t.device == first.device and t.layout is torch.strided
        for t in given.values()
    ) and (first.is_cuda or (INTERPRETED and first.is_cpu)):
        return
    raise KernelError(
        "expected dense operands of one dtype among float32, float64 and bfloat16 on one CUDA device "
        f"(CPU tensors where TRITON_INTERPRET=1 was set before Triton was imported); got {described(**given)}. "
        "Cast or move the module or its input so that all agree"
    )


def expect_indices(like: Tensor, **given: Tensor) -> None:
    """Raises `KernelError` unless all are int32 vectors on the device of `like`."""
    if any(t.dtype is not torch.int32 or t.dim() != 1 or t.device != like.device for t in given.values()):
        raise KernelError(f"expected int32 vectors on {like.device}, got {described(**given)}")


def expect_shapes(fit: bool, **given: Tensor) -> None:
    """Raises `KernelError` unless the shapes fit one another."""
    if not fit:
        raise KernelError(f"expected operands whose shapes fit, got {described(**given)}")


def expect_rows(crow_indices: Tensor, indices: Tensor, columns: int) -> None:
    """Raises `KernelError` for rows that no kernel may follow, where looking costs no wait for the device.

    On a GPU, the contents are looked at under `TRITON_DEBUG=1` alone; without it, no kernel reads outside its
    operands: an entry out of range makes what it would add to NaN.
    """
    if crow_indices.shape[0] == 0 or (columns == 0 and indices.shape[0] > 0):
        raise KernelError(
            f"expected crow_indices [rows + 1] and indices in [0, {columns}), "
            f"got {described(crow_indices=crow_indices, indices=indices)}"
        )
    if indices.shape[0] >= 2**31:
        raise KernelError(f"expected fewer than 2^31 entries, got {indices.shape[0]}; split the batch")
    if _DEBUG or not indices.is_cuda:
        check_rows(crow_indices, indices, columns)


def described(**given: Tensor) -> str:
    return ", ".join(f"{name} {t.dtype} {tuple(t.shape)} on {t.device}" for name, t in given.items())


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever its arguments say."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype is torch.float64 else tl.float32


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def contiguous_rows(matrix: Tensor) -> Tensor:
    """`matrix`, or a copy where its rows are not contiguous or overlap."""
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


def block_of(width: int, most: int) -> int:
    """How many of `width` neighbours one program takes: a power of two up to `most`, at least one for each lane."""
    return max(min(triton.next_power_of_2(width), most), _LANES)


def blocks_of(width: int, block: int) -> int:
    """How many blocks cover `width`; raises `KernelError` where a grid cannot have so many in its second dimension."""
    blocks = triton.cdiv(width, block)
    if blocks > 65535:
        raise KernelError(
            f"expected at most {65535 * block} neighbours (tokens, or the width), got {width}; split them"
        )
    return int(blocks)
