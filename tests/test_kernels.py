"""Every product x backend x ISA x thread count, in the three groups of the testing policy."""

from __future__ import annotations

import pytest
import torch

from cases import PROBLEMS, PRODUCTS, WIDTHS, Problem, Product
from checkers import check_bounded, check_exact
from offpath.kernels import Backend

DTYPES = (torch.float32, torch.float64)

pytestmark = pytest.mark.usefixtures("threads")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", (*WIDTHS, *PROBLEMS), ids=lambda p: p.name)
@pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: p.name)
def test_exact(product: Product, backend: Backend, problem: Problem, dtype: torch.dtype) -> None:
    check_exact(product, backend, problem, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", (*WIDTHS, *PROBLEMS), ids=lambda p: p.name)
@pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: p.name)
def test_bounded(product: Product, backend: Backend, problem: Problem, dtype: torch.dtype) -> None:
    check_bounded(product, backend, problem, dtype)
