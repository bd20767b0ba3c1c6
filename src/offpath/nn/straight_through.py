"""JumpReLU on sparse rows, with the straight-through gradients of its thresholds.

Both functions are piecewise constant in the threshold; the gradients are the estimates of Rajamanoharan et al.
("Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders", 2024): entries within half a
bandwidth of their threshold stand for the density there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offpath.ops import SparseRows
from offpath.ops.library import wide


def jump(rows: SparseRows, thresholds: Tensor, bandwidth: float) -> SparseRows:
    """The entries that are larger than the threshold of their column (or NaN), and 0 in place of the others.

    The gradient of a threshold, of `thresholds` [columns], is -threshold / bandwidth for each entry within half a
    `bandwidth` of it.

    >>> rows = SparseRows.from_dense(torch.tensor([[0.5, 2.0]]))
    >>> jump(rows, torch.tensor([1.0, 1.0]), 0.1).to_dense()
    tensor([[0., 2.]])
    """
    return rows.with_values(_Jump.apply(rows.values, rows.indices, thresholds, bandwidth))


def step(rows: SparseRows, thresholds: Tensor, bandwidth: float) -> SparseRows:
    """1 where an entry is larger than the threshold of its column (or NaN), and 0 elsewhere: their sum is the L0 norm.

    The gradient of a threshold is -1 / bandwidth for each entry within half a `bandwidth` of it; values get none.

    >>> rows = SparseRows.from_dense(torch.tensor([[0.5, 2.0]]))
    >>> step(rows, torch.tensor([1.0, 1.0]), 0.1).to_dense()
    tensor([[0., 1.]])
    """
    return rows.with_values(_Step.apply(rows.values, rows.indices, thresholds, bandwidth))


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, thresholds, bandwidth):
        ctx.save_for_backward(values, indices, thresholds)
        ctx.bandwidth = bandwidth
        return torch.where(values <= _of_entries(thresholds, indices), 0.0, values)

    @staticmethod
    def backward(ctx, gradient):
        values, indices, thresholds = ctx.saved_tensors
        of_entries = _of_entries(thresholds, indices)
        through = torch.where(values <= of_entries, 0.0, gradient).to(values.dtype)
        of_thresholds = None
        if ctx.needs_input_grad[2]:
            near = (values - of_entries).abs() < ctx.bandwidth / 2
            of_thresholds = _summed(torch.where(near, -of_entries / ctx.bandwidth * gradient, 0.0), indices, thresholds)
        return through, None, of_thresholds, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, thresholds, bandwidth):
        ctx.save_for_backward(values, indices, thresholds)
        ctx.bandwidth = bandwidth
        return (~(values <= _of_entries(thresholds, indices))).to(thresholds.dtype)

    @staticmethod
    def backward(ctx, gradient):
        values, indices, thresholds = ctx.saved_tensors
        near = (values - _of_entries(thresholds, indices)).abs() < ctx.bandwidth / 2
        of_entries = torch.where(near, -gradient / ctx.bandwidth, 0.0)
        return None, None, _summed(of_entries, indices, thresholds), None


def _of_entries(thresholds: Tensor, indices: Tensor) -> Tensor:
    return thresholds.index_select(0, indices)


def _summed(of_entries: Tensor, indices: Tensor, thresholds: Tensor) -> Tensor:
    """The sums [columns] of what belongs to the entries, in float32 at least, rounded once."""
    sums = wide(thresholds).new_zeros(thresholds.shape)
    if _adds_in_order(sums):  # and takes a sixth of the time
        return sums.index_add(0, indices, of_entries.to(sums.dtype)).to(thresholds.dtype)
    return sums.index_put((indices.long(),), of_entries.to(sums.dtype), accumulate=True).to(thresholds.dtype)


def _adds_in_order(sums: Tensor) -> bool:
    """Whether `index_add` gives the same sums each time; `index_put` sorts first."""
    return sums.is_cpu
