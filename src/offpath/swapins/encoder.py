"""What the swap-ins share of an encoder: all of its pre-activations for those who ask, and single ones for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from offpath.kernels.operands import wide
from offpath.ops import SparseRows
from offpath.ops.library import direct, is_differentiating
from offpath.ops.row_choice import SURELY_SPARSE
from offpath.ops.selection import row_pointer


def few_live(dense: Tensor) -> bool:
    """Whether so few entries are other than zero that sparse rows pay.

    >>> few_live(torch.eye(32)), few_live(torch.eye(8))
    (True, False)
    """
    return int(torch.count_nonzero(dense)) <= dense.numel() * SURELY_SPARSE


def pre_activations(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight.T + bias, [rows, latents], for those who use all of them.

    Losses such as AuxK send a gradient to a few of them; the backward pass then touches only these. It cannot be
    differentiated once more, except by `torch.func`, where it is an ordinary product.

    >>> weight = torch.ones(3, 2, requires_grad=True)
    >>> pre_activations(torch.ones(1, 2), weight, torch.zeros(3))[0, 1].backward()
    >>> weight.grad
    tensor([[0., 0.],
            [1., 1.],
            [0., 0.]])
    """
    if is_differentiating():
        return torch.nn.functional.linear(x, weight, bias)  # there, nobody can look at which entries get a gradient
    result: Tensor = _PreActivations.apply(x, weight, bias)
    return result


class _PreActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable  # a derivative of it would have to know of the entries that are zero as well
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        dbias = gradient.sum(0) if wants_bias else None
        if not few_live(gradient):
            return gradient @ weight if wants_x else None, gradient.T @ x if wants_weight else None, dbias
        rows = SparseRows.from_dense(gradient)
        dx = rows @ weight if wants_x else None
        dweight = None
        if wants_weight:
            dweight = direct.rows_weight_gradient(rows.values, rows.crow_indices, rows.indices, x, weight.shape[0])
        return dx, dweight, dbias


def activations_at(indices: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """<x[b], weight[i]> + bias[i] for the latents i = indices[b, :] of each row: int32 [rows, k] to [rows, k].

    >>> activations_at(torch.tensor([[1]]).int(), torch.tensor([[2.0]]), torch.tensor([[1.0], [3.0]]), torch.ones(2))
    tensor([[7.]])
    """
    crow_indices = row_pointer(indices.shape[0], indices.shape[1], indices.device)
    flat = indices.flatten()
    return (direct.rows_dots(x, crow_indices, flat, weight) + of_latents(bias, flat)).view(indices.shape)


def of_latents(numbers: Tensor, indices: Tensor) -> Tensor:
    """Those of the entries; the gradients of all entries of a latent are summed in float32 and rounded once."""
    return wide(numbers).index_select(0, indices).to(numbers.dtype)


class LazyPreActivations(Tensor):
    """Pre-activations that nobody has asked for yet: the first use of any kind computes them.

    So [rows, latents] is not stored where only the largest few are wanted, and whoever does look sees the numbers, with
    their gradient. Raises `RuntimeError` when an operand was written to in between.

    >>> x, weight = torch.ones(1, 2), torch.ones(3, 2)
    >>> lazy = LazyPreActivations(lambda x, weight: x @ weight.T, x, weight)
    >>> lazy + 1
    tensor([[3., 3., 3.]])
    """

    _compute: Callable[..., Tensor]
    _operands: tuple[Tensor, ...]
    _versions: tuple[int, ...]
    _has_gradient: bool  # as where it was encoded: a look from elsewhere is no other one
    _computed: Tensor | None

    @staticmethod
    def __new__(cls, compute: Callable[..., Tensor], x: Tensor, weight: Tensor, *others: Tensor) -> LazyPreActivations:
        shape = (*x.shape[:-1], weight.shape[0])
        lazy: LazyPreActivations = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=x.dtype, device=x.device)
        lazy._compute, lazy._operands, lazy._computed = compute, (x, weight, *others), None
        lazy._versions = tuple(map(_version, lazy._operands))
        lazy._has_gradient = torch.is_grad_enabled()
        return lazy

    def __init__(self, *operands: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_computed, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without types
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(
            f"expected a torch function to compute these pre-activations first, got {func}; add 0 to them"
        )


def _computed(operand: Any) -> Any:
    if not isinstance(operand, LazyPreActivations):
        return operand
    if operand._computed is None:
        if tuple(map(_version, operand._operands)) != operand._versions:
            raise RuntimeError(
                "expected the input and the encoder as they were when it encoded, but one of them has been written to "
                "since; look at the pre-activations before the optimizer's step"
            )
        inference = any(used.is_inference() for used in operand._operands)
        with (
            torch.autocast("cpu", enabled=False),
            torch.inference_mode(inference),
            torch.set_grad_enabled(operand._has_gradient),
        ):
            operand._computed = operand._compute(*operand._operands)
    return operand._computed


def _version(operand: Tensor) -> int:
    return -1 if operand.is_inference() else operand._version
