"""Every checker rejects every wrong backend, and accepts the definition."""

from __future__ import annotations

import pytest
import torch

from cases import PROBLEMS, PRODUCTS, WIDTHS
from checkers import REFERENCE, check_bounded, check_exact
from mutants import MUTANTS, Mutant

CHECKERS = {"exact": check_exact, "bounded": check_bounded}


def _rejections(checker: str, backend) -> int:
    count = 0
    for product in PRODUCTS:
        for problem in (*WIDTHS[:3], *PROBLEMS):
            try:
                CHECKERS[checker](product, backend, problem, torch.float32)
            except AssertionError:
                count += 1
    return count


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.backend.name)
def test_mutant_is_rejected(mutant: Mutant, checker: str) -> None:
    if checker in mutant.rejected_by:
        assert _rejections(checker, mutant.backend) > 0


@pytest.mark.parametrize("checker", CHECKERS)
def test_the_definition_is_accepted(checker: str) -> None:
    assert _rejections(checker, REFERENCE) == 0
