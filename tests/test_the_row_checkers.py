"""Every checker of sparse rows rejects the implementations that it must reject, and accepts the definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from offpath.kernels.row_products import RowProducts
from row_cases import BAD_ROWS, LARGE_PROBLEMS, PROBLEMS, PRODUCTS, PRODUCTS_OF_VIEWS, WIDTHS
from row_checkers import (
    DEFINITION,
    check_above,
    check_batch_topk,
    check_bounded,
    check_counts,
    check_encode_bounded,
    check_encode_exact,
    check_encode_scores,
    check_exact,
    check_refuses,
    check_special,
    check_topk,
    check_untouched,
)
from row_mutants import ROW_MUTANTS, RowMutant
from selection_cases import ENCODE_PROBLEMS, EVERY_KIND, SCORES, SHAPES, SMALL_SHAPES
from selection_mutants import SELECTION_MUTANTS

pytestmark = pytest.mark.usefixtures("one_thread")
MUTANTS = (*ROW_MUTANTS, *SELECTION_MUTANTS)


def _products(check: Callable) -> Callable[[RowProducts], Iterator[None]]:
    def run(rows: RowProducts) -> Iterator[None]:
        views = PRODUCTS_OF_VIEWS if check is check_exact else ()
        for product in (*PRODUCTS, *views):
            for problem in (*WIDTHS[:9], *PROBLEMS):
                yield check(product, rows, problem, torch.float32)

    return run


def _selections(check: Callable) -> Callable[[RowProducts], Iterator[None]]:
    def run(rows: RowProducts) -> Iterator[None]:
        for shape in (*SMALL_SHAPES[:6], *SHAPES):
            for kind in EVERY_KIND:
                yield check(rows, kind, shape, torch.float32)

    return run


# What each checker does, step by step, so that a test can stop at the first rejection.
CHECKERS: dict[str, Callable[[RowProducts], Iterator[None]]] = {
    "exact": _products(check_exact),
    "bounded": _products(check_bounded),
    "untouched": lambda rows: (check_untouched(rows, p, torch.bfloat16) for p in (*PROBLEMS, *LARGE_PROBLEMS)),
    "special": lambda rows: iter([check_special(rows, torch.float32)]),
    "refuses": lambda rows: (check_refuses(rows, *bad) for bad in BAD_ROWS.values()),
    "counts": lambda rows: (check_counts(rows, problem) for problem in PROBLEMS),
    "topk": _selections(check_topk),
    "batch_topk": _selections(check_batch_topk),
    "above": _selections(check_above),
    "encode exact": lambda rows: (check_encode_exact(rows, p, torch.float32) for p in ENCODE_PROBLEMS),
    "encode bounded": lambda rows: (check_encode_bounded(rows, p, torch.float32) for p in ENCODE_PROBLEMS),
    "encode scores": lambda rows: (check_encode_scores(rows, kind, (1, 2500), torch.float32) for kind in SCORES),
}


def _rejects(checker: str, rows: RowProducts) -> bool:
    try:
        for _ in CHECKERS[checker](rows):
            pass
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_rejected(mutant: RowMutant) -> None:
    assert [checker for checker in mutant.rejected_by if not _rejects(checker, mutant.rows)] == []


@pytest.mark.parametrize("checker", CHECKERS)
def test_the_definition_is_accepted(checker: str) -> None:
    assert not _rejects(checker, DEFINITION)


def test_every_checker_has_something_to_reject() -> None:
    assert {checker for mutant in MUTANTS for checker in mutant.rejected_by} == set(CHECKERS)
