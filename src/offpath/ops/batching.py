"""What `torch.func.vmap` makes of an op: one call where the op has leading dimensions of its own, a loop elsewhere.

torch would loop as well, and tell the user to file an issue with PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from offpath.kernels import KernelError


def rule(op: Callable[..., Any], folds: bool) -> Callable[..., tuple[Any, Any]]:
    """For `torch.library.register_vmap`; `folds` says that first operand and result may have any leading dimensions."""

    def run(info: Any, in_dims: tuple[Any, ...], *operands: Any) -> tuple[Any, Any]:
        first, *others = in_dims
        if folds and first is not None and not any(isinstance(dim, int) for dim in others):
            return op(operands[0].movedim(first, 0), *operands[1:]), 0
        results = [op(*_selected(operands, in_dims, place)) for place in range(info.batch_size)]
        if isinstance(results[0], tuple):
            return tuple(_stacked(op, parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])
        return _stacked(op, results), 0

    return run


def _stacked(op: Any, parts: Sequence[Tensor]) -> Tensor:
    if len({part.shape for part in parts}) > 1:
        raise KernelError(
            f"expected results of one shape for torch.func.vmap, but how many entries {op.name()} finds differs from "
            "sample to sample; choose a fixed number (topk_rows, TopK, activation='topk'), or loop over the samples"
        )
    return torch.stack(tuple(parts))


def _selected(operands: tuple[Any, ...], in_dims: tuple[Any, ...], place: int) -> list[Any]:
    return [
        operand.select(dim, place).contiguous() if isinstance(dim, int) else operand
        for operand, dim in zip(operands, in_dims, strict=True)
    ]
