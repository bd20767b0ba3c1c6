"""Products over the bits of a pattern for more tokens than go through a cache at once, on whole numbers."""

from __future__ import annotations

import pytest
import torch

from offpath import kernels
from offpath.kernels import Backend
from whole_numbers import whole_numbers

# (rows, columns, batch, sparsity): a token more than go at once; rows and columns that end amid groups, chunks and
# panels; more rows than a chunk is filled with at once; nearly no connections; several tasks in each direction.
SIZES = [(13, 70, 257, 0.2), (100, 200, 513, 0.5), (800, 200, 300, 0.1), (97, 130, 600, 0.98), (1100, 600, 520, 0.7)]


@pytest.mark.parametrize("backend", [name for name in kernels.backends() if name != "reference"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_product_is_exact(
    backend: Backend, threads: int, size: tuple[int, int, int, float], dtype: torch.dtype
) -> None:
    pattern, values, x, dy, bias = whole_numbers(*size, dtype)
    bitmap = backend.bitmap(pattern.crow_indices, pattern.col_indices, pattern.shape[1])
    weight, mask = pattern.to_dense(values), pattern.to_mask()
    gradient = dy.double().t() @ x.double()
    for given, of_y in ((x, dy), (x.t().contiguous().t(), dy.t().contiguous().t())):
        y = backend.filled_spmm(bitmap, values, given, bias)
        assert torch.equal(y, (x.double() @ weight.double().t() + bias.double()).to(dtype))
        assert torch.equal(backend.filled_dx(bitmap, values, of_y), (dy.double() @ weight.double()).to(dtype))
        assert torch.equal(backend.filled_dvalues(bitmap, of_y, given), gradient[mask].to(dtype))
    assert torch.equal(backend.expand(bitmap, values), weight)
    assert torch.equal(backend.compress(bitmap, gradient.to(dtype)), gradient[mask].to(dtype))


@pytest.mark.parametrize("backend", [name for name in kernels.backends() if name != "reference"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_part_of_a_register_is_exact(backend: Backend, dtype: torch.dtype) -> None:
    """Tokens that end in either half of any register, for an odd number of groups of rows and of columns.

    There are more rows than a chunk of columns is filled with at once: sums are kept between.
    """
    pattern, values, x, dy, bias = whole_numbers(1027, 75, 72, 0.4, dtype)
    bitmap = backend.bitmap(pattern.crow_indices, pattern.col_indices, pattern.shape[1])
    weight = pattern.to_dense(values).double()
    y, dx = (x.double() @ weight.t() + bias.double()).to(dtype), (dy.double() @ weight).to(dtype)
    for batch in range(1, 73):
        assert torch.equal(backend.filled_spmm(bitmap, values, x[:batch], bias), y[:batch])
        assert torch.equal(backend.filled_dx(bitmap, values, dy[:batch]), dx[:batch])
        assert torch.equal(backend.bitmap_dx(bitmap, values, dy[:batch]), dx[:batch])


@pytest.mark.parametrize("backend", [name for name in kernels.backends() if name != "reference"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [512, 513, 1155, 2048])
def test_rows_of_several_pieces_are_exact(backend: Backend, columns: int, dtype: torch.dtype) -> None:
    """Tokens of one panel: rows are filled some words at a time, as many as come out even, and multiplied each time."""
    pattern, values, x, _, bias = whole_numbers(27, columns, 31, 0.4, dtype)
    bitmap = backend.bitmap(pattern.crow_indices, pattern.col_indices, columns)
    y = (x.double() @ pattern.to_dense(values).double().t() + bias.double()).to(dtype)
    scales = torch.tensor([0.25, 2.0, 1.0]).repeat(9)
    scaled = values.double() * scales.double()[pattern.row_indices().long()]
    of_int8 = (x.double() @ pattern.to_dense(scaled).t() + bias.double()).to(dtype)
    for batch in (1, 4, 8, 9, 16, 17, 31):
        assert torch.equal(backend.filled_spmm(bitmap, values, x[:batch], bias), y[:batch])
        got = backend.filled_int8_spmm(bitmap, values.to(torch.int8), scales, x[:batch], bias)
        assert torch.equal(got, of_int8[:batch])
