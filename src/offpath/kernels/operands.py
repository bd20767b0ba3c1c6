"""What kernels expect of a tensor, and how they say what came instead."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from offpath.kernels.backend import KernelError

DTYPES = (torch.float32, torch.float64, torch.bfloat16)

Made = TypeVar("Made")
_NOTHING = nullcontext()


def in_own_dtype(operand: Tensor) -> AbstractContextManager[object]:
    """A block in which torch multiplies in the dtype of the operands, as kernels do, also inside of an autocast."""
    # Asked in every product that is left to torch: turning off what is off would take as long as a small one.
    if not torch._C._is_any_autocast_enabled():
        return _NOTHING
    return torch.autocast(operand.device.type, enabled=False)


def on_device_of(operand: Tensor) -> AbstractContextManager[object]:
    """A block in which the operand's GPU is the current one, whose costs are the ones that are looked up."""
    if not operand.is_cuda or operand.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(operand.get_device())


def address(tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if address == 0 and tensor.numel():
        raise KernelError(f"expected a tensor with memory behind it, got {tuple(tensor.shape)} whose storage was freed")
    return address


def is_vector(tensor: Tensor, dtype: torch.dtype, count: int) -> bool:
    # Asked in every call of a layer: comparing shapes would take three times as long.
    return (
        tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.dim() == 1
        and tensor.numel() == count
        and tensor.is_contiguous()
    )


def is_matrix(tensor: Tensor, dtype: torch.dtype) -> bool:
    return are_tokens(tensor, dtype) and tensor.dim() == 2


def are_tokens(tensor: Tensor, dtype: torch.dtype) -> bool:
    return (
        tensor.dtype is dtype
        and dtype in DTYPES
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.dim() >= 2
    )


def are_indices(crow_indices: Tensor, col_indices: Tensor) -> bool:
    return (
        crow_indices.dtype is torch.int32
        and col_indices.dtype is torch.int32
        and crow_indices.is_cpu
        and col_indices.is_cpu
        and crow_indices.dim() == 1
        and col_indices.dim() == 1
        and crow_indices.shape[0] > 0
        and crow_indices.is_contiguous()
        and col_indices.is_contiguous()
    )


def refuse(**given: Tensor | None) -> NoReturn:
    got = ", ".join(
        f"{name} {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        + ("" if tensor.dim() != 1 or tensor.is_contiguous() else " (not contiguous)")
        for name, tensor in given.items()
        if tensor is not None
    )
    raise KernelError(
        f"expected dense CPU tensors: contiguous int32 indices, and operands of one dtype among "
        f"{', '.join(map(str, DTYPES))} whose shapes fit, vectors contiguous; got {got}. "
        "Cast or move the module or its input so that all agree"
    )


def one_unit_stride(matrix: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """`matrix` with its (feature, batch) strides, one of them 1; a copy only when the tensor has no such stride."""
    batch_stride, feature_stride = matrix.stride()
    if feature_stride != 1 and batch_stride != 1:
        matrix = matrix.contiguous()
        batch_stride, feature_stride = matrix.stride()
    return matrix, (feature_stride, batch_stride)


def token_strides(x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """The same for x [..., features] as [tokens, features]."""
    if x.dim() == 2:
        return one_unit_stride(x)
    return x.contiguous(), (1, x.shape[-1])


def wide(operand: Tensor) -> Tensor:
    """16-bit operands are summed in float32 and rounded once."""
    return operand.float() if operand.element_size() == 2 else operand


def made_once(make: Callable[[], Made], indices: Tensor) -> Made:
    """What products make of a layer's `indices` once and keep.

    A GPU has then made it: a thread with another stream may ask next. And the memory is the process's: while
    `torch.compile` gets ready to capture a graph, that of the calling thread comes from the graph's own, where nothing
    may stay. Raises `KernelError` while a graph is captured, which would make it in every replay, and before the first
    one nowhere.
    """
    if not indices.is_cuda:
        return make()
    if torch.cuda.is_current_stream_capturing():
        raise KernelError(
            "expected what a product makes of a layer's connections to be there when a graph is captured, and this is "
            "its first call. Run it once before, forward and backward, with as many tokens"
        )
    stream = torch.cuda.current_stream(indices.device)

    def make_it() -> Made:
        with torch.cuda.stream(stream):
            made = make()
            stream.synchronize()
        return made

    with ThreadPoolExecutor(max_workers=1) as helper:
        return helper.submit(make_it).result()


def row_numbers(crow_indices: Tensor, nnz: int | None = None) -> Tensor:
    """The row of each entry; a compiler has to be told how many there are."""
    # Not the method of an arange, which compilers decompose into an index that an empty batch is outside of.
    return torch.repeat_interleave(crow_indices.diff().long(), output_size=nnz)
