"""Every product and selection on sparse rows x backend x ISA x dtype: exact and bounded.

A test goes through all problems: one pytest item for each would take longer to set up than to run.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from offpath.kernels import Backend
from row_cases import LARGE_PROBLEMS, PROBLEMS, PRODUCTS, PRODUCTS_OF_VIEWS, WIDTHS, every_backend
from row_checkers import (
    check_above,
    check_batch_topk,
    check_bounded,
    check_counts,
    check_encode_bounded,
    check_encode_exact,
    check_encode_scores,
    check_exact,
    check_special,
    check_topk,
    check_untouched,
)
from selection_cases import ENCODE_PROBLEMS, EVERY_KIND, SCORES, SHAPES, SMALL_SHAPES

# That two and three threads give the same bits as one is a test of its own.
pytestmark = pytest.mark.usefixtures("one_thread")
every_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)


@every_dtype
@every_backend
@pytest.mark.parametrize("check", [check_exact, check_bounded])
def test_products(check: Callable, backend: Backend, dtype: torch.dtype) -> None:
    for product in PRODUCTS:
        for problem in (*WIDTHS, *PROBLEMS, *LARGE_PROBLEMS):
            check(product, backend.rows, problem, dtype)


@every_dtype
@every_backend
def test_products_of_views(backend: Backend, dtype: torch.dtype) -> None:
    for product in PRODUCTS_OF_VIEWS:
        for problem in PROBLEMS:
            check_exact(product, backend.rows, problem, dtype)


@every_dtype
@every_backend
def test_rows_of_the_buffer_without_an_entry_keep_every_bit(backend: Backend, dtype: torch.dtype) -> None:
    for problem in (*WIDTHS[::7], *PROBLEMS, *LARGE_PROBLEMS):
        check_untouched(backend.rows, problem, dtype)


@every_dtype
@every_backend
def test_nan_and_infinities_go_where_they_belong(backend: Backend, dtype: torch.dtype) -> None:
    check_special(backend.rows, dtype)


@every_backend
def test_counts(backend: Backend) -> None:
    for problem in (*PROBLEMS, *LARGE_PROBLEMS):
        check_counts(backend.rows, problem)


@every_dtype
@every_backend
@pytest.mark.parametrize("check", [check_topk, check_batch_topk, check_above])
def test_selections(check: Callable, backend: Backend, dtype: torch.dtype) -> None:
    for shape in SMALL_SHAPES:
        check(backend.rows, "many ties" if shape[1] % 3 else "some NaN and infinities", shape, dtype)
    for shape in SHAPES:
        for kind in EVERY_KIND:
            check(backend.rows, kind, shape, dtype)


@every_dtype
@every_backend
def test_encoder(backend: Backend, dtype: torch.dtype) -> None:
    for problem in ENCODE_PROBLEMS:
        check_encode_exact(backend.rows, problem, dtype)
        check_encode_bounded(backend.rows, problem, dtype)


@every_dtype
@every_backend
def test_encoder_of_any_scores(backend: Backend, dtype: torch.dtype) -> None:
    for kind in SCORES:
        for shape in ((3, 70), (1, 2500)):
            check_encode_scores(backend.rows, kind, shape, dtype)
