"""JumpReLU on entries of a matrix, with the straight-through gradients of its thresholds.

Both functions are piecewise constant in the threshold; the gradients are the estimates of Rajamanoharan et al.
("Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders", 2024): entries within half a
bandwidth of their threshold stand for the density there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offpath.ops import SparseRows
from offpath.ops.library import wide
from offpath.ops.transformable import in_both_modes


def jump(values: Tensor, thresholds: Tensor, bandwidth: float) -> Tensor:
    """The values that are larger than their threshold (or NaN), and 0 in place of the others; all [nnz].

    The gradient of a threshold is -threshold / bandwidth for each entry within half a `bandwidth` of it.

    >>> jump(torch.tensor([0.5, 2.0]), torch.tensor([1.0, 1.0]), 0.1)
    tensor([0., 2.])
    """
    return _jump(values, thresholds, bandwidth)


def step(values: Tensor, thresholds: Tensor, bandwidth: float) -> Tensor:
    """1 where a value is larger than its threshold (or NaN), and 0 elsewhere; all [nnz]. Their sum is the L0 norm.

    The gradient of a threshold is -1 / bandwidth for each entry within half a `bandwidth` of it; values get none.

    >>> step(torch.tensor([0.5, 2.0]), torch.tensor([1.0, 1.0]), 0.1)
    tensor([0., 1.])
    """
    return _step(values, thresholds, bandwidth)


def thresholds_of(rows: SparseRows, thresholds: Tensor) -> Tensor:
    """The threshold of each entry [nnz]; the gradients of a unit's entries are summed in float32 and rounded once.

    >>> thresholds_of(SparseRows.from_dense(torch.tensor([[0.0, 2.0]])), torch.tensor([0.5, 1.0]))
    tensor([1.])
    """
    return _of_entries(thresholds, rows.indices)


class _OfEntries:
    @staticmethod
    def compute(thresholds, indices):
        return thresholds.index_select(0, indices)

    @staticmethod
    def saved(ctx, thresholds, indices):
        ctx.units = thresholds.shape[0]
        return (indices,)

    @staticmethod
    def backward(ctx, gradient):
        (indices,) = ctx.saved_tensors
        gradients = wide(gradient)
        sums = gradients.new_zeros(ctx.units)
        if _adds_in_order(sums):  # and takes less time
            sums = sums.index_add(0, indices, gradients)
        else:
            sums = sums.index_put((indices.long(),), gradients, accumulate=True)
        return sums.to(gradient.dtype), None

    @staticmethod
    def jvp_rule(ctx, saved, of_thresholds, _):
        (indices,) = saved
        return of_thresholds.index_select(0, indices)


def _adds_in_order(sums: Tensor) -> bool:
    """Whether `index_add` gives the same sums each time; `index_put` sorts first."""
    return sums.is_cpu


class _StraightThrough:
    """Of entries and their thresholds."""

    @staticmethod
    def saved(ctx, values, thresholds, bandwidth):
        ctx.bandwidth = bandwidth
        return values, thresholds


def _near(values: Tensor, thresholds: Tensor, bandwidth: float) -> Tensor:
    return (values - thresholds).abs() < bandwidth / 2


class _Jump(_StraightThrough):
    @staticmethod
    def compute(values, thresholds, bandwidth):
        return torch.where(values <= thresholds, 0.0, values)

    @staticmethod
    def backward(ctx, gradient):
        values, thresholds = ctx.saved_tensors  # once: activation checkpointing frees them when they are unpacked
        near = _near(values, thresholds, ctx.bandwidth)
        through = torch.where(values <= thresholds, 0.0, gradient).to(values.dtype)
        return through, torch.where(near, -thresholds / ctx.bandwidth * gradient, 0.0), None

    @staticmethod
    def jvp_rule(ctx, saved, of_values, of_thresholds, _):
        values, thresholds = saved
        near = _near(values, thresholds, ctx.bandwidth)
        through = torch.where(values <= thresholds, 0.0, of_values)
        return (through + torch.where(near, -thresholds / ctx.bandwidth * of_thresholds, 0.0)).to(values.dtype)


class _Step(_StraightThrough):
    @staticmethod
    def compute(values, thresholds, bandwidth):
        return (~(values <= thresholds)).to(thresholds.dtype)

    @staticmethod
    def backward(ctx, gradient):
        values, thresholds = ctx.saved_tensors
        return None, torch.where(_near(values, thresholds, ctx.bandwidth), -gradient / ctx.bandwidth, 0.0), None

    @staticmethod
    def jvp_rule(ctx, saved, of_values, of_thresholds, _):
        values, thresholds = saved
        return torch.where(_near(values, thresholds, ctx.bandwidth), -of_thresholds / ctx.bandwidth, 0.0)


_of_entries, _jump, _step = (in_both_modes(rules) for rules in (_OfEntries, _Jump, _Step))
