"""What kernels expect of a tensor, and how they say what came instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, TypeVar

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


def refuse_freed(**given: Tensor | None) -> None:
    """Raises `KernelError` for tensors without the memory that they had."""
    for name, tensor in given.items():
        if tensor is None or not tensor.is_cpu or tensor.layout is not torch.strided or not _has_storage(tensor):
            continue
        if tensor.numel() and tensor.data_ptr() == 0:
            raise KernelError(
                f"expected a tensor with memory behind it, got {name} {tuple(tensor.shape)} whose storage was freed"
            )


def _has_storage(tensor: Tensor) -> bool:
    try:
        tensor.untyped_storage()
    except RuntimeError:  # what a transform that is over has left behind: torch has no other way to ask
        return False
    return True


def refuse(**given: Tensor | None) -> NoReturn:
    refuse_freed(**given)
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


def copied_or_refused(
    product: Callable[..., bool],
    operands: Sequence[Any],
    named: Mapping[str, Tensor | None],
    least_dims: int = 2,
) -> None:
    """Compute a native product that has refused its `operands` after all, with copies of activations that need one.

    Those are the ones of which no stride is 1, as what `expand` makes. Vectors, which have `least_dims` 1, are not
    copied for layers: it would be done anew in each call. Raises `KernelError` for what else does not fit, with what is
    `named`.
    """
    refuse_freed(**named)  # before a copy reads it
    if not product(*contiguous(operands, named.values(), least_dims)):
        refuse(**named)


def not_expanded(gradient: Tensor) -> Tensor:
    """`gradient`, or a copy where it is one number, expanded: what the backward pass of a sum gives.

    Products would refuse it and be called again with the copy, which takes longer.
    """
    if gradient.layout is not torch.strided or gradient.is_contiguous() or 1 in gradient.stride():
        return gradient
    refuse_freed(gradient=gradient)
    return gradient.contiguous()


def contiguous(
    operands: Sequence[Any], inputs: Iterable[Tensor | None], least_dims: int, results: Iterable[Tensor] = ()
) -> list[Any]:
    """`operands`, with copies of those `inputs` among them that lie in memory otherwise, and are no `results`."""
    copied = {id(one) for one in inputs if one is not None and one.layout is torch.strided and one.dim() >= least_dims}
    copied -= set(map(id, results))
    return [one.contiguous() if id(one) in copied else one for one in operands]


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
