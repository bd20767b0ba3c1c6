"""Every checker rejects every wrong backend, and accepts the definition."""

from __future__ import annotations

import pytest
import torch

from cases import PRODUCTS
from checkers import REFERENCE, check_bounded, check_exact
from mutants import MUTANTS, Mutant
from offpath.kernels import Backend
from problems import PROBLEMS, WIDTHS

pytestmark = pytest.mark.usefixtures("one_thread")

CHECKERS = {"exact": check_exact, "bounded": check_bounded}


def _rejects(checker: str, backend: Backend) -> bool:
    try:
        for problem in (*WIDTHS[:3], *PROBLEMS):  # the small ones first: they reject nearly all
            for product in PRODUCTS:
                CHECKERS[checker](product, backend, problem, torch.float32)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.backend.name)
def test_mutant_is_rejected(mutant: Mutant, checker: str) -> None:
    if checker in mutant.rejected_by:
        assert _rejects(checker, mutant.backend)


@pytest.mark.parametrize("checker", CHECKERS)
def test_the_definition_is_accepted(checker: str) -> None:
    assert not _rejects(checker, REFERENCE)
