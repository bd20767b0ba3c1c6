"""Products over the bits of a pattern for more tokens than go through a cache at once, on whole numbers."""

from __future__ import annotations

import pytest
import torch

from offpath import pattern as patterns
from offpath.kernels import Backend

# (rows, columns, batch, sparsity): a token more than go at once; rows and columns that end amid groups, chunks and
# panels; more rows than a chunk is filled with at once; nearly no connections.
SIZES = [(13, 70, 257, 0.2), (100, 200, 513, 0.5), (800, 200, 300, 0.1), (97, 130, 600, 0.98)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_product_is_exact(
    backend: Backend, threads: int, size: tuple[int, int, int, float], dtype: torch.dtype
) -> None:
    rows, columns, batch, sparsity = size
    generator = torch.Generator().manual_seed(rows)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randint(-4, 5, shape, generator=generator).to(dtype)

    pattern = patterns.from_mask(torch.rand(rows, columns, generator=generator) >= sparsity)
    values, x, dy, bias = drawn(pattern.nnz), drawn(batch, columns), drawn(batch, rows), drawn(rows)
    bitmap = backend.bitmap(pattern.crow_indices, pattern.col_indices, columns)
    weight, mask = pattern.to_dense(values), pattern.to_mask()
    gradient = dy.double().t() @ x.double()
    for given, of_y in ((x, dy), (x.t().contiguous().t(), dy.t().contiguous().t())):
        y = backend.filled_spmm(bitmap, values, given, bias)
        assert torch.equal(y, (x.double() @ weight.double().t() + bias.double()).to(dtype))
        assert torch.equal(backend.filled_dx(bitmap, values, of_y), (dy.double() @ weight.double()).to(dtype))
        assert torch.equal(backend.filled_dvalues(bitmap, of_y, given), gradient[mask].to(dtype))
    assert torch.equal(backend.expand(bitmap, values), weight)
    assert torch.equal(backend.compress(bitmap, gradient.to(dtype)), gradient[mask].to(dtype))
