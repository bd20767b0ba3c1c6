"""What a layer is fed, as its weight matrix meets it, and what pruning remembers of that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Inputs are converted and unfolded in pieces of about so many numbers.
PIECE = 1 << 20


def fed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input of a layer that was called with these arguments."""
    return args[0] if args else next(iter(kwargs.values()), None)


def geometry(module: nn.Module) -> tuple[object, ...]:
    """What, besides its input, decides about the rows that a layer's weight meets."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return (
            type(module).__name__,
            module.kernel_size,
            module.stride,
            module.dilation,
            module.groups,
            module.padding_mode,
            *module._reversed_padding_repeated_twice,
        )
    return ()


def rows(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """What the weight of `module` is multiplied with, in pieces [groups, rows, columns] of float64.

    For a linear layer these are the tokens, for a convolution the patches under its kernel.
    """
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        tokens = x.reshape(-1, x.shape[-1])
        for piece in tokens.split(max(1, PIECE // max(1, tokens.shape[1]))):
            yield piece.double().unsqueeze(0)
        return
    one_dimensional = isinstance(module, nn.Conv1d)
    images = x if x.dim() == (3 if one_dimensional else 4) else x.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    for image in images:
        padded = functional.pad(image.unsqueeze(0).double(), module._reversed_padding_repeated_twice, mode)
        if one_dimensional:
            patches = functional.unfold(padded.unsqueeze(2), (1, *kernel), (1, *dilation), 0, (1, *stride))
        else:
            patches = functional.unfold(padded, kernel, dilation, 0, stride)
        yield patches[0].unflatten(0, (module.groups, -1)).mT


class Norms:
    """Sum of squares of each column of the rows that were added: O(columns) of memory, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._total: Tensor | None = None

    def add(self, piece: Tensor) -> None:
        """Add rows [groups, rows, columns]."""
        self.count += piece.shape[1]
        self._total = self._sum(self._total, piece)

    def _sum(self, total: Tensor | None, piece: Tensor) -> Tensor:
        squares = piece.square().sum(1)
        return squares if total is None else total.add_(squares)

    def value(self) -> Tensor:
        """||X_j|| of each column j, [groups, columns]."""
        assert self._total is not None
        return self._total.sqrt()


class Hessian(Norms):
    """The Hessian of a layer's squared error, 2 X X^T over the number of rows: O(columns^2) of memory, in float64.

    In float32 the sums over many tokens and the inverse would lose what a small dampening leaves of the smallest
    eigenvalues; the products cost little beside the passes through the model.
    """

    def _sum(self, total: Tensor | None, piece: Tensor) -> Tensor:
        return piece.mT @ piece if total is None else total.baddbmm_(piece.mT, piece)

    def value(self) -> Tensor:
        """H, [groups, columns, columns]."""
        assert self._total is not None
        return self._total * (2 / self.count)


def check_input(name: str, x: Any) -> None:
    """Raise `ValueError` where the statistics of layer `name` could not be taken from `x`."""
    if not isinstance(x, Tensor) or x.is_nested or x.layout != torch.strided or not x.is_floating_point():
        what = f"a {x.dtype} tensor" if isinstance(x, Tensor) and not x.is_nested else type(x).__name__
        raise ValueError(f"expected layer {name!r} to be fed plain numbers in floating point, got {what}")
    if x.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(x.detach()))).all()):
        raise ValueError(
            f"expected finite activations, got NaN or infinity at the input of layer {name!r}; check the calibration "
            "data and the model's dtype"
        )
