"""The product over a plan, whichever a variant makes, in sizes that fill and overflow its tiles, strips and panels."""

from __future__ import annotations

import pytest
import torch

from offpath import kernels, pattern as patterns
from offpath.kernels import Backend
from whole_numbers import whole_numbers

# (rows, columns, batch, sparsity): one of everything; whole tiles; more rows and tokens than whole ones; rows of tiles
# that take turns, since a strip of 1100 columns leaves the cache; runs longer than a tile is wide; hardly any
# connections; and nearly all, of which plans are others.
SIZES = [
    (1, 1, 1, 0.0),
    (48, 64, 64, 0.5),
    (49, 65, 65, 0.5),
    (200, 1100, 129, 0.7),
    (450, 1100, 33, 0.3),
    (97, 3000, 63, 0.98),
    (60, 130, 16, 0.1),
    (60, 130, 7, 0.9),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_product_is_exact_in_every_layout(
    backend: Backend, threads: int, size: tuple[int, int, int, float], dtype: torch.dtype
) -> None:
    pattern, values, x, dy, bias = whole_numbers(*size, dtype)
    weight = pattern.to_dense(values).double()
    plan = backend.plan(pattern.crow_indices, pattern.col_indices, pattern.shape[1], dtype)
    crow_indices, col_indices, permutation = pattern.transpose()
    transpose = backend.plan(crow_indices, col_indices, pattern.shape[0], dtype, permutation)
    expected = (x.double() @ weight.t() + bias.double()).to(dtype)
    for given in (x, x.t().contiguous().t()):
        assert torch.equal(backend.planned_spmm(plan, values, given, bias), expected)
        assert torch.equal(backend.planned_spmm(plan, values, given, bias, feature_major=True), expected)
    assert torch.equal(backend.planned_spmm(transpose, values, dy), (dy.double() @ weight).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_any_number_of_tokens_is_right(backend: Backend, dtype: torch.dtype) -> None:
    """Panels go together where they are whole, or padding makes them so; what lies behind the tokens is nobody's."""
    for batch in (*range(1, 131), 159, 160, 161, 191, 192, 193, 223, 224, 225, 255, 256, 257, 300):
        pattern, values, x, dy, bias = whole_numbers(50, 130, batch, 0.6, dtype)
        plan = backend.plan(pattern.crow_indices, pattern.col_indices, pattern.shape[1], dtype)
        tiles = backend.tiles(pattern.crow_indices, pattern.col_indices, pattern.shape[1])
        y = (x.double() @ pattern.to_dense(values).double().t() + bias.double()).to(dtype)
        dvalues = (dy.double().t() @ x.double())[pattern.row_indices(), pattern.col_indices.long()].to(dtype)
        x_rows, dy_rows = (_before_nan(operand) for operand in (x, dy))
        x_columns, dy_columns = (_before_nan(operand.t()).t() for operand in (x, dy))
        for given, gradient in ((x_rows, dy_rows), (x_columns, dy_columns)):
            assert torch.equal(backend.planned_spmm(plan, values, given, bias), y), batch
            assert torch.equal(backend.tiled_sddmm(tiles, gradient, given), dvalues), batch


def _before_nan(operand: torch.Tensor) -> torch.Tensor:
    """The same in a larger tensor, with NaN behind each row and behind the last one."""
    behind = operand.new_full((operand.shape[0] + 64, operand.shape[1] + 64), torch.nan)
    behind[: operand.shape[0], : operand.shape[1]] = operand
    return behind[: operand.shape[0], : operand.shape[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_value_that_is_not_finite_reaches_its_own_row_and_column_alone(
    backend: Backend, size: tuple[int, int, int, float], dtype: torch.dtype
) -> None:
    """Padding has no value: not even one that zeros are multiplied with."""
    pattern, values, x, dy, _ = whole_numbers(*size, dtype)
    values[0] = torch.nan
    row, column = int((pattern.crow_indices > 0).nonzero()[0]) - 1, int(pattern.col_indices[0])
    plan = backend.plan(pattern.crow_indices, pattern.col_indices, pattern.shape[1], dtype)
    crow_indices, col_indices, permutation = pattern.transpose()
    transpose = backend.plan(crow_indices, col_indices, pattern.shape[0], dtype, permutation)
    y, dx = backend.planned_spmm(plan, values, x), backend.planned_spmm(transpose, values, dy)
    assert y.isnan().any(0).nonzero().flatten().tolist() == [row]
    assert dx.isnan().any(0).nonzero().flatten().tolist() == [column]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_int8_values_are_scaled_by_row(backend: Backend, threads: int, size: tuple[int, int, int, float]) -> None:
    pattern, values, x, _, bias = whole_numbers(*size, torch.float32)
    scales = 2.0 ** torch.randint(-3, 4, (size[0],), generator=torch.Generator().manual_seed(0))
    plan = backend.plan(pattern.crow_indices, pattern.col_indices, pattern.shape[1], torch.float32)
    weight = pattern.to_dense(values).double() * scales.double()[:, None]
    y = backend.planned_int8_spmm(plan, values.to(torch.int8), scales, x, bias)
    assert torch.equal(y, (x.double() @ weight.t() + bias.double()).float())


def test_a_plan_takes_no_more_than_its_connections_ask_for() -> None:
    """Runs and buckets alike: some bytes for each connection, not for each position."""
    pattern = patterns.random((3000, 3000), 9_000, torch.Generator().manual_seed(0))
    for name, backend in kernels.backends().items():
        if backend.native:
            plan = backend.plan(pattern.crow_indices, pattern.col_indices, 3000, torch.float32)
            # Buckets: a column and a slot for each connection, 64 counts and 2 sizes for each group of six rows, and
            # what is read ahead. Runs have less: a run (8 bytes) is that of a row. Already its bits would be too many.
            most = 8 * pattern.nnz + 4 * 66 * (3000 // 6 + 1) + 64
            assert plan.bytes <= most < 3000 * 3000 // 8, name
