"""Forward-mode differentiation: the tangents of what an op gives, of those of its operands.

A rule takes all operands, all results and the tangent of each operand, None where it has none. Products are linear in
each factor: their tangent is a sum of the same product with one factor after the other replaced by its tangent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from offpath.ops.library import direct
from offpath.ops.transformable import Rule

Some = Tensor | None


def of_op(name: str, *factors: int) -> Rule:
    """Of an op of `direct` with one result, a product of the operands at `factors`."""

    def product(*operands: Any) -> Tensor:
        # The op is there when its tangent is asked for, not yet when that is made.
        return getattr(direct, name)(*operands)

    return of_product(product, *factors)


def of_product(product: Callable[..., Tensor], *factors: int) -> Rule:
    """The same for any function."""

    def rule(operands: Sequence[Any], outputs: Sequence[Tensor], tangents: Sequence[Some]) -> Some:
        given = [at for at in factors if tangents[at] is not None]
        return total(product(*_replaced(operands, at, tangents[at])) for at in given)

    return rule


def with_bias(product: Rule, at: int, behind: int) -> Rule:
    """Of a `product` plus the operand at `at`, one number for each feature; so many dimensions are `behind` these."""

    def rule(operands: Sequence[Any], outputs: Sequence[Tensor], tangents: Sequence[Some]) -> Some:
        of_bias = tangents[at]
        if of_bias is not None:
            of_bias = of_bias.view(-1, *[1] * behind).expand_as(outputs[0])
        return total((product(_replaced(operands, at, None), outputs, tangents), of_bias))

    return rule


def _replaced(operands: Sequence[Any], at: int, by: Any) -> list[Any]:
    return [*operands[:at], by, *operands[at + 1 :]]


def total(terms: Iterable[Some]) -> Some:
    """The sum of the terms that there are, None for none."""
    there = [term for term in terms if term is not None]
    return sum(there[1:], there[0]) if there else None


OF_DOTS, OF_WEIGHT_GRADIENT = (of_op(name, 0, 3) for name in ("rows_dots", "rows_weight_gradient"))
