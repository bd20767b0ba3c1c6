"""Whether a sparse layer computes what the dense one stands for, within what rounding may do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from offpath.convert.compress.weights import Dense
from offpath.cost.bounds import HALF_PRECISION, Expected, excess, expected, gamma
from offpath.nn import Int8Embedding, Int8SparseLinear
from offpath.nn.autocast import under_autocast

# By how much an output may move when its layer is swapped, given the layer's input.
Bound = Callable[[Tensor], Tensor]
# Tokens and images of which every output is compared: all of a call go through the same code.
CHECKED_TOKENS, CHECKED_IMAGES = 16, 2


def right_output(dense: Dense, x: Tensor, int8: bool = False) -> Expected:
    """What `dense` gives for x in exact arithmetic, and how far from it a rounded result may be.

    The bound is gamma_k (|W| |x| + |b|) with k the connections of the row and the bias (`offpath.cost.bounds`), and one
    rounding more in half precision; two more still from an `int8` layer, where the sum and its product with the scale
    may have been rounded, too. Under autocast, what counts is what it makes of the operands. Takes the layer's weight
    in float64 while it runs.
    """
    x, weight, bias = under_autocast(x, dense.weight.detach(), None if dense.bias is None else dense.bias.detach())
    operands = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    with torch.autocast(x.device.type, enabled=False):
        exact = functional_call(dense, {name: p.double() for name, p in operands.items()}, x.double())
        size = functional_call(dense, {name: p.float().abs() for name, p in operands.items()}, x.float().abs())
    terms = torch.count_nonzero(dense.weight.detach().flatten(1), dim=1) + 1
    # Of a convolution's output, the channels are followed by its one or two dimensions.
    terms = terms.view(-1, *(1,) * (dense.weight.dim() - 2))
    right = expected(exact, size, terms, x.dtype)
    if int8 and x.dtype in HALF_PRECISION:
        return Expected(exact, right.bound + gamma(torch.tensor(2, device=x.device), x.dtype) * (size + right.bound))
    return right


@torch.no_grad()
def check_layer(name: str, dense: Dense, sparse: nn.Module, x: Tensor) -> None:
    """Raise `RuntimeError`, naming the layer, if `sparse` is wrong for `x`."""
    if not x.numel():
        return
    result, most = sparse(x), CHECKED_TOKENS
    if isinstance(dense, nn.Linear):
        x = x.reshape(-1, x.shape[-1])
        result = result.reshape(len(x), -1)
    elif x.dim() == dense.weight.dim():
        most = CHECKED_IMAGES
    else:  # one image without a dimension for it
        x, result = x.unsqueeze(0), result.unsqueeze(0)
    chosen = torch.linspace(0, max(len(x) - 1, 0), min(most, len(x)), device=x.device).long()
    times = excess(result[chosen], right_output(dense, x[chosen], isinstance(sparse, Int8SparseLinear)))
    if times is not None:
        raise RuntimeError(
            f"layer {name!r}: the sparse layer's output is off by {times:.3g} times the error bound, so nothing was "
            "changed. This should not happen: please report it, and leave the layer out with filter_fn"
        )


def swap_bound(dense: Callable[[], Dense], replacement: nn.Module) -> Bound:
    """How far the outputs of a layer and of its `replacement` may be apart for an input.

    Both round: twice the bound of one. An int8 weight is off by up to half its row's scale besides.
    """

    def bound(x: Tensor) -> Tensor:
        layer = dense()
        apart = 2 * right_output(layer, x, isinstance(replacement, Int8SparseLinear)).bound
        if isinstance(replacement, Int8SparseLinear):
            off = (layer.weight != 0).double() * replacement.scales.double()[:, None] / 2
            apart += linear(x.double().abs(), off)
        return apart

    return bound


def embedding_bound(replacement: Int8Embedding) -> Bound:
    """How far the rows of an embedding and of its int8 `replacement` may be apart: half a scale, and their rounding."""

    def bound(indices: Tensor) -> Tensor:
        eps = torch.finfo(replacement.dtype).eps
        scales = replacement.scales[indices, None].double()
        return (scales * (0.5 + 127 * eps)).expand(*indices.shape, replacement.embedding_dim)

    return bound
