"""Gradients on a GPU that are taken together, run in Python as in `triton_in_python.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import checkers
import row_checkers
from offpath.kernels import reference, reference_rows
from offpath.kernels.gpu import counting_sort, sparse_weight
from offpath.kernels.methods import PreparedMatrix, PreparedWeight
from row_cases import RowProblem
from triton_in_python import BACKEND, EMPTY_ROWS, ROW_PROBLEMS, _rows, every_dtype, mutated


@every_dtype
def test_both_gradients_at_once_are_those_of_each(dtype: torch.dtype) -> None:
    for problem in (ROW_PROBLEMS[0], *ROW_PROBLEMS[2:], *EMPTY_ROWS):
        draw = row_checkers.small_integers(3, dtype)
        values, dy = draw(problem.indices.shape), draw((problem.rows, problem.width))
        weight = draw((problem.columns, problem.width))
        rows = problem.crow_indices, problem.indices
        with checkers.poisoned_memory():
            dots, gradient = counting_sort.row_gradients(*rows, values, dy, weight)
        assert torch.equal(dots, reference_rows.dots(*rows, dy, weight)), problem.name
        expected = reference_rows.weight_gradient(*rows, values, dy, problem.columns)
        assert torch.equal(gradient, expected), problem.name
        _check_encoder_gradients(counting_sort, problem, values, dy)


def _check_encoder_gradients(module: ModuleType, problem: RowProblem, values: torch.Tensor, dy: torch.Tensor) -> None:
    rows = problem.crow_indices, problem.indices
    with checkers.poisoned_memory():
        gradient, totals = module.encoder_gradients(*rows, values, dy, problem.columns)
    ones = torch.ones(problem.rows, 1, dtype=dy.dtype)
    for got, of in ((gradient, dy), (totals[:, None], ones)):
        right = reference_rows.weight_gradient(*rows, values, of, problem.columns)
        assert torch.equal(got, right), problem.name


@pytest.mark.parametrize(("tokens", "transposes"), [(3, 0), (16, 3), (18, 4)])
def test_both_gradients_of_a_layer_turn_dy_once(tokens: int, transposes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """dy, x, and dx back; without a multiple of 16 tokens, each gradient pads dy for itself."""
    turned = []
    transpose = sparse_weight.transpose
    monkeypatch.setattr(sparse_weight, "transpose", lambda *both: (turned.append(both), transpose(*both)))
    crow_indices, col_indices = _rows()
    transposed = torch.tensor([0, 1, 1, 2], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    weight = PreparedWeight(PreparedMatrix(crow_indices, col_indices, 3), lambda: PreparedMatrix(*transposed, 1))
    draw = checkers.small_integers(5, torch.float32)
    values, dy, x = draw((2,)), draw((tokens, 1)), draw((tokens, 3))
    backend = replace(BACKEND, lay_by_feature=sparse_weight.lay_by_feature)
    got = weight.backward(backend, "row-wise", "row-wise", values, dy, x)
    right = weight.backward(reference.BACKEND, "row-wise", "row-wise", values, dy, x)
    assert all(map(torch.equal, got, right)) and len(turned) == transposes


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("total += value", "total = value"),
        ("if TOTALS and block == 0:", "if TOTALS and block == 1:"),
        ("totals + name,", "totals + name // 2,"),
    ],
)
def test_a_mutant_of_the_totals_is_rejected(old: str, new: str, tmp_path: Path) -> None:
    mutant = mutated(counting_sort, old, new, tmp_path)
    with pytest.raises(AssertionError):
        for problem in ROW_PROBLEMS:
            draw = row_checkers.small_integers(3, torch.float32)
            operands = draw(problem.indices.shape), draw((problem.rows, problem.width))
            _check_encoder_gradients(mutant, problem, *operands)
