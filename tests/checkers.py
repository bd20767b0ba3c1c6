"""What every kernel must pass, in three groups. `test_the_checkers.py` shows that each one can fail."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from cases import Operands, Product
from offpath import kernels
from offpath.kernels import Backend
from offpath.pattern import Pattern
from problems import Problem, gaussian, small_integers

REFERENCE = kernels.backends()["reference"]


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def gamma(terms: Tensor, dtype: torch.dtype) -> Tensor:
    """gamma_k = k u / (1 - k u) for k = terms + 1 (Higham, "Accuracy and Stability", section 3.1)."""
    ku = (terms.double() + 1) * unit_roundoff(dtype)
    return ku / (1 - ku)


def in_float64(operands: Operands) -> Operands:
    return {name: tensor.double() for name, tensor in operands.items()}


def run_unmodified(product: Product, backend: Backend, pattern: Pattern, operands: Operands) -> Tensor:
    """The backend's result on fresh NaN-filled memory; fails when it wrote to an operand."""
    own = {name: tensor.clone() for name, tensor in operands.items()}
    with poisoned_memory():
        result = product.run(backend, pattern, own)
    for name, tensor in operands.items():
        assert torch.equal(tensor, own[name]), f"{backend.name} modified its operand {name}"
    return result


class poisoned_memory:
    """torch fills every tensor that it allocates without values with NaN (a feature of its deterministic mode)."""

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self.before[0])
        torch.utils.deterministic.fill_uninitialized_memory = self.before[1]


@lru_cache(maxsize=128)  # the problems of one product and dtype, which every backend and thread count is given
def _defined(
    product: Product, problem: Problem, dtype: torch.dtype, draw: Callable
) -> tuple[Pattern, Operands, Tensor, Tensor]:
    """A pattern, operands, what the definition makes of them in float64, and what it makes of their absolute values."""
    pattern = problem.pattern
    operands = product.draw(pattern, problem.batch, draw(1, dtype))
    wide = in_float64(operands)
    size = product.run(REFERENCE, pattern, {name: tensor.abs() for name, tensor in wide.items()})
    return pattern, operands, product.run(REFERENCE, pattern, wide), size


def check_exact(product: Product, backend: Backend, problem: Problem, dtype: torch.dtype) -> None:
    """Small integers: the same bits as the reference in float64."""
    pattern, operands, exact, _ = _defined(product, problem, dtype, small_integers)
    result = run_unmodified(product, backend, pattern, operands)
    expected = exact.to(dtype)
    assert result.dtype == dtype and result.shape == expected.shape
    assert torch.equal(result, expected), f"{product.name} on {problem.name}: not exact"


def check_bounded(product: Product, backend: Backend, problem: Problem, dtype: torch.dtype) -> None:
    """Gaussian operands: |y - y64| <= gamma_k (|A| |x|), the a-priori bound for any order of summation."""
    pattern, operands, exact, size = _defined(product, problem, dtype, gaussian)
    result = run_unmodified(product, backend, pattern, operands)
    terms = product.terms(pattern, problem.batch)
    # The float64 reference errs too, by the same formula.
    summed_in = torch.float32 if dtype is torch.bfloat16 else dtype
    bound = (gamma(terms, summed_in) + gamma(terms, torch.float64)) * size
    if summed_in is not dtype:  # the sum is rounded once more, relative to what was summed
        bound += unit_roundoff(dtype) * (exact.abs() + bound)
    error = (result.double() - exact).abs()
    assert not bool(result.isnan().any()), f"{product.name} on {problem.name}: NaN"
    assert bool((error <= bound).all()), f"{product.name} on {problem.name}: error over bound"


@torch.no_grad()
def assert_same(found: Tensor, right: Tensor) -> None:
    """Of computations in float64 that round up to a thousand times, in numbers of the size of the largest one."""
    assert float((found - right).abs().max()) <= 1000 * unit_roundoff(torch.float64) * float(right.abs().max())
