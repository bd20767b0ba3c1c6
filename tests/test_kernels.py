"""Every product x backend x ISA x dtype x thread count, in the three groups of the testing policy.

A test goes through all problems: one pytest item for each would take longer to set up than to run.
"""

from __future__ import annotations

import pytest
import torch

from cases import PRODUCTS, Product
from checkers import check_bounded, check_exact
from offpath.kernels import Backend
from problems import LARGE_PROBLEMS, PROBLEMS, WIDTHS

DTYPES = (torch.float32, torch.float64, torch.bfloat16)

pytestmark = pytest.mark.usefixtures("threads")
# The scope makes pytest go through all backends and thread counts before the next product, while its operands are kept.
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str, scope="module")
every_product = pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: p.name, scope="module")


@every_dtype
@every_product
def test_exact(product: Product, backend: Backend, dtype: torch.dtype) -> None:
    for problem in (*WIDTHS, *PROBLEMS, *LARGE_PROBLEMS):
        check_exact(product, backend, problem, dtype)


@every_dtype
@every_product
def test_bounded(product: Product, backend: Backend, dtype: torch.dtype) -> None:
    for problem in (*WIDTHS, *PROBLEMS, *LARGE_PROBLEMS):
        check_bounded(product, backend, problem, dtype)
