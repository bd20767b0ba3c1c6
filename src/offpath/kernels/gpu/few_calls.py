"""What the CUDA kernels of a few tokens share: how they are launched, and what is asked of the operands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offpath.kernels.errors import KernelError
from offpath.kernels.gpu.driver import Kernel


@dataclass(frozen=True)
class Launches:
    """How calls of one kind are launched, `batch` tokens at a time."""

    kernel: Kernel
    batch: int
    threads: int
    shared_bytes: int
    resident_blocks: int


def launches(kernel: Kernel, batch: int, warps: int, shared_bytes: int) -> Launches:
    """Those of blocks of so many warps."""
    threads = warps * 32
    return Launches(kernel, batch, threads, shared_bytes, kernel.resident_blocks(threads, shared_bytes))


def expect_tokens(
    values: Tensor,
    shape: tuple[int, int],
    x: Tensor,
    bias: Tensor | None,
    most: int,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
    **places: Tensor | None,
) -> None:
    """Raises `KernelError` unless `x` and `bias` fit a weight of `shape` (rows, columns), packed into `values`.

    `dtypes` are those that its kernel reads; values come in 16 bytes at a time, and so do the `places` that are named.
    """
    for name, tensor in (("values", values), *places.items()):
        if tensor is None:
            continue
        # A module's `to` casts what was packed in another dtype, and a view may begin anywhere.
        if values.dtype not in dtypes or tensor.data_ptr() % 16:
            raise KernelError(
                f"expected a weight that is packed in {' or '.join(map(str, dtypes))}, aligned to 16 bytes, got {name} "
                f"of {tensor.dtype} at an address with a rest of {tensor.data_ptr() % 16}. Pack the sparse layer again "
                "in the dtype that it is to have"
            )
    rows, columns = shape
    fits = (
        x.dim() == 2
        and x.shape[0] <= most
        and x.shape[1] == columns
        and x.is_contiguous()
        and _is_like(x, values)
        and (bias is None or (bias.shape == (rows,) and bias.is_contiguous() and _is_like(bias, values)))
    )
    if not fits:
        got = f"x {x.dtype} {tuple(x.shape)} on {x.device}" + (" (not contiguous)" if not x.is_contiguous() else "")
        if bias is not None:
            got += f", bias {bias.dtype} {tuple(bias.shape)} on {bias.device}"
        raise KernelError(
            f"expected contiguous x [at most {most}, {columns}] and bias [{rows}] of {values.dtype} on "
            f"{values.device}, where the weight is; got {got}. Cast or move them, or take another product for "
            "more tokens"
        )


def _is_like(tensor: Tensor, values: Tensor) -> bool:
    return tensor.dtype is values.dtype and tensor.device == values.device
