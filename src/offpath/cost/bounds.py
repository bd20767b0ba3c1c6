"""How far a sum of products may be from the exact one, whatever the order of its terms."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# A result in one of these is summed in float32 and rounded once at the end.
HALF_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Expected:
    """A result in float64, and how far from it a right one may be, element by element.

    Where only a part is known, it is `result[index]` of a result of `shape`. `size` is the sum of the products'
    absolute values.
    """

    exact: Tensor
    bound: Tensor
    index: tuple[slice | Tensor, ...] = ()
    shape: tuple[int, ...] | None = None
    size: Tensor | None = None

    def with_operands_rounded(self, unit: float) -> Expected:
        """The same where both operands of every product have first been rounded by up to `unit` of themselves."""
        assert self.size is not None
        return replace(self, bound=self.bound + (2 * unit + unit * unit) * (self.size + self.bound))


def gamma(terms: Tensor, dtype: torch.dtype) -> Tensor:
    """gamma_k = k u / (1 - k u) for k = terms + 1 (Higham, "Accuracy and Stability", section 3.1), in float64.

    >>> float(gamma(torch.tensor(0), torch.float64))
    1.1102230246251568e-16
    """
    ku = (terms.double() + 1) * (torch.finfo(dtype).eps / 2)
    return ku / (1 - ku)


def expected(exact: Tensor, size: Tensor, terms: Tensor, dtype: torch.dtype) -> Expected:
    """What a sum of `terms` products of numbers of `dtype` may come to.

    `exact` is the sum as float64 gives it, `size` the sum of the products' absolute values as float32 gives it;
    `terms` broadcasts to their shape. A result in half precision is taken to be summed in float32.

    >>> right = expected(torch.tensor([1.0]).double(), torch.tensor([1.0]), torch.tensor(1), torch.float32)
    >>> excess(torch.tensor([1.0]), right), excess(torch.tensor([2.0]), right) > 1
    (None, True)
    """
    summed_in = torch.float32 if dtype in HALF_PRECISION else dtype
    # float32 may have summed `size` too small by its own gamma; the float64 sum errs by the same formula.
    size = size.double() / (1 - gamma(terms, torch.float32))
    bound = (gamma(terms, summed_in) + gamma(terms, torch.float64)) * size
    if dtype is not summed_in:
        bound += (torch.finfo(dtype).eps / 2) * (exact.abs() + bound)
    return Expected(exact, bound, size=size)


def excess(result: Tensor, right: Expected) -> float | None:
    """None for a result within the bound; else how many times the bound it is off (NaN, a wrong shape: infinity)."""
    if result.shape != (right.exact.shape if right.shape is None else right.shape):
        return float("inf")
    error = (result[right.index].double() - right.exact).abs()
    if bool((error <= right.bound).all()):
        return None
    ratio = torch.where(error <= right.bound, 0.0, error / right.bound)
    return float(ratio.nan_to_num(nan=float("inf"), posinf=float("inf")).max())
