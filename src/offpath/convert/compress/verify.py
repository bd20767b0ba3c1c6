"""Whether a sparse layer computes what the dense one stands for, within what rounding may do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from offpath.cost.bounds import HALF_PRECISION, Expected, excess, expected, gamma
from offpath.nn import Int8Embedding, Int8SparseLinear

# By how much an output may move when its layer is swapped, given the layer's input.
Bound = Callable[[Tensor], Tensor]
# Tokens of which every output is compared: all of a call go through the same code.
CHECKED_TOKENS = 16


def right_output(dense: nn.Linear, x: Tensor, int8: bool = False) -> Expected:
    """What `dense` gives for x [tokens, in] in exact arithmetic, and how far from it a rounded result may be.

    The bound is gamma_k (|W| |x| + |b|) with k the connections of the row and the bias (`offpath.cost.bounds`), and one
    rounding more in half precision; two more still from an `int8` layer, where the sum and its product with the scale
    may have been rounded, too. Takes the layer's weight in float64 while it runs.
    """
    weight, bias = dense.weight.detach(), None if dense.bias is None else dense.bias.detach()
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = linear(x.float().abs(), weight.float().abs(), None if bias is None else bias.float().abs())
    right = expected(exact, size, torch.count_nonzero(weight, dim=1) + 1, x.dtype)
    if int8 and x.dtype in HALF_PRECISION:
        return Expected(exact, right.bound + gamma(torch.tensor(2), x.dtype) * (size + right.bound))
    return right


@torch.no_grad()
def check_layer(name: str, dense: nn.Linear, sparse: nn.Module, x: Tensor) -> None:
    """Raise `RuntimeError`, naming the layer, if `sparse` is wrong for `x` [..., in]."""
    tokens = x.reshape(-1, x.shape[-1])
    rows = torch.linspace(0, max(len(tokens) - 1, 0), min(CHECKED_TOKENS, len(tokens))).long()
    result = sparse(x).reshape(len(tokens), -1)[rows]
    times = excess(result, right_output(dense, tokens[rows], isinstance(sparse, Int8SparseLinear)))
    if times is not None:
        raise RuntimeError(
            f"layer {name!r}: the sparse layer's output is off by {times:.3g} times the error bound, so nothing was "
            "changed. This should not happen: please report it, and leave the layer out with filter_fn"
        )


def swap_bound(dense: Callable[[], nn.Linear], replacement: nn.Module) -> Bound:
    """How far the outputs of a linear layer and of its `replacement` may be apart for an input [..., in].

    Both round: twice the bound of one. An int8 weight is off by up to half its row's scale besides.
    """

    def bound(x: Tensor) -> Tensor:
        linear_layer, tokens = dense(), x.reshape(-1, x.shape[-1])
        apart = 2 * right_output(linear_layer, tokens, isinstance(replacement, Int8SparseLinear)).bound
        if isinstance(replacement, Int8SparseLinear):
            off = (linear_layer.weight != 0).double() * replacement.scales.double()[:, None] / 2
            apart += linear(tokens.double().abs(), off)
        return apart.view(*x.shape[:-1], -1)

    return bound


def embedding_bound(replacement: Int8Embedding) -> Bound:
    """How far the rows of an embedding and of its int8 `replacement` may be apart: half a scale, and their rounding."""

    def bound(indices: Tensor) -> Tensor:
        eps = torch.finfo(replacement.dtype).eps
        scales = replacement.scales[indices, None].double()
        return (scales * (0.5 + 127 * eps)).expand(*indices.shape, replacement.embedding_dim)

    return bound
