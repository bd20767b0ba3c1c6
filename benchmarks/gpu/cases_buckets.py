"""Cases of the products with a sparse weight whose activations wait in shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from gpu.cases_decode import Shape
from gpu.check import Case, sums
from gpu.draws import dense, numbers, pattern
from offpath.cost.bounds import Expected
from offpath.kernels.gpu.bucketed import plan, planned_spmm, tiled_sddmm, tiles

# Blocks and regions that are cut off, full ones, empty ones; more chunks of columns than buffers. At 1 %, a region is
# as large as shared memory.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "small": ((1, 1, 1.0), (300, 33, 0.5), (40, 64, 0.0)),
    "full": ((1, 1, 1.0), (300, 33, 0.5), (40, 64, 0.0), (260, 200, 1.0), (70, 3000, 0.05), (1000, 1000, 0.02),
             (1000, 1000, 0.01), (3000, 70, 0.1)),
}  # fmt: skip
TOKENS = {"small": (17,), "full": (1, 64, 130, 500)}


def cases(scale: str, device: torch.device) -> Iterator[Case]:
    """None in Triton's interpreter: these are CUDA kernels."""
    for shape in SHAPES.get(scale, ()):
        crow_indices, col_indices = pattern(*shape, device)
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in TOKENS[scale]:
                yield from _products(crow_indices, col_indices, shape, tokens, dtype)


def _products(
    crow_indices: Tensor, col_indices: Tensor, shape: Shape, tokens: int, dtype: torch.dtype
) -> Iterator[Case]:
    rows, columns, density = shape
    draw = partial(numbers, dtype=dtype, device=col_indices.device)
    values, bias, x, dy = draw(col_indices.numel()), draw(rows), draw(tokens, columns), draw(tokens, rows)
    name = f"{str(dtype).removeprefix('torch.')}, {rows} x {columns} at {1 - density:.0%} sparsity, {tokens} tokens"
    counts = crow_indices.diff()

    def right_sums() -> tuple[Expected, ...]:
        matrix = dense(crow_indices, col_indices, values, columns).double()
        exact, size = (by(x.double()) @ by(matrix).t() + by(bias.double()) for by in (torch.clone, torch.abs))
        return (sums(exact, size, counts[None, :] + 1, dtype),)

    def right_dots() -> tuple[Expected, ...]:
        row = torch.arange(rows, device=counts.device).repeat_interleave(counts)
        products = dy.double()[:, row] * x.double()[:, col_indices.long()]
        terms = torch.tensor(tokens, device=counts.device)
        return (sums(products.sum(0), products.abs().sum(0), terms, dtype),)

    buckets, regions = plan(crow_indices, col_indices, columns, dtype), tiles(crow_indices, col_indices, columns)
    yield Case("planned_spmm", name, partial(planned_spmm, buckets, values, x, bias), right_sums, (values, x, bias))
    yield Case("tiled_sddmm", name, partial(tiled_sddmm, regions, dy, x), right_dots, (dy, x))
