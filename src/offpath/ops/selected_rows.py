"""How sparse rows are made of dense scores: the largest of each row or of a batch, and those above a threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from offpath.kernels import KernelError
from offpath.ops.library import direct
from offpath.ops.selection import check_scores
from offpath.ops.sparse_rows import SparseRows


def topk_rows(x: Tensor, k: int) -> SparseRows:
    """The k largest entries of each row of `x` [rows, columns].

    Of equal entries those with the lowest index; NaN counts as the largest. The gradient goes to the chosen entries.
    Raises `KernelError` for k outside [0, columns].

    >>> topk_rows(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), 2).indices
    tensor([1, 3], dtype=torch.int32)
    """
    check_scores(x)
    values, indices = direct.topk_rows(x, k)
    return SparseRows.from_topk(values, indices, x.shape[1])


def batch_topk(x: Tensor, k: int) -> SparseRows:
    """The k largest entries of all of `x` [rows, columns]: rows differ in how many they have (Bussmann et al., 2024).

    >>> batch_topk(torch.tensor([[1.0, 3.0], [4.0, 0.0]]), 2).crow_indices
    tensor([0, 1, 2], dtype=torch.int32)
    """
    check_scores(x)
    crow_indices, indices, values = direct.batch_topk(x, k)
    return SparseRows(crow_indices, indices, values, x.shape[1])


def above(x: Tensor, threshold: Tensor | float = 0.0) -> SparseRows:
    """The entries of `x` [rows, columns] that are larger than a threshold, a number or one for each column (or NaN).

    With 0 these are the ones that ReLU lets through. The threshold gets no gradient. A number, or a
    tensor of a wider dtype than that of `x`, is rounded down to it, which lets the same entries through.

    >>> above(torch.tensor([[1.0, -3.0], [4.0, 0.0]])).values
    tensor([1., 4.])
    """
    check_scores(x)
    if not isinstance(threshold, Tensor):
        threshold = torch.tensor(threshold, dtype=torch.float64, device=x.device)
    elif threshold.shape not in ((), (1,), (x.shape[1],)):
        raise KernelError(
            f"expected one threshold, or one for each of the {x.shape[1]} columns, got shape {tuple(threshold.shape)}"
        )
    threshold = _round_down(threshold.detach(), x.dtype)
    crow_indices, indices, values = direct.above(x, threshold.expand(x.shape[1]).contiguous())
    return SparseRows(crow_indices, indices, values, x.shape[1])


def encode_topk(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> SparseRows:
    """`topk_rows(x @ weight.T + bias, k)` without storing the product.

    `x` [rows, width], `weight` [latents, width], `bias` [latents] or None, of one dtype. The
    gradients touch only what was chosen: no [rows, latents] and no [rows, k, width] is ever made.

    >>> encode_topk(torch.tensor([[1.0]]), torch.tensor([[1.0], [3.0]]), None, 1).values
    tensor([3.])
    """
    values, indices = direct.encode_topk(x, weight, bias, k)
    return SparseRows.from_topk(values, indices, weight.shape[0])


def _round_down(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number of `dtype` that is not above `threshold`: the same entries of that dtype exceed both."""
    nearest = threshold.to(dtype)
    if torch.promote_types(dtype, threshold.dtype) is dtype:
        return nearest
    below = torch.nextafter(nearest, torch.full_like(nearest, -torch.inf))
    return torch.where(nearest > threshold, below, nearest)
