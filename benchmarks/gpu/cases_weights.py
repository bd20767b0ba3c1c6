"""Cases of the products with a sparse weight, and of weights as bits: packed, expanded, compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from gpu.check import Case, exactly, sums
from gpu.draws import dense, numbers, pattern
from offpath.cost.bounds import Expected
from offpath.kernels import reference
from offpath.kernels.gpu import expand, sparse_weight

Shape = tuple[int, int, float]  # rows, columns, density
SHAPES: dict[str, tuple[Shape, ...]] = {
    "tiny": ((3, 33, 0.3),),
    "small": ((5, 33, 0.5), (16, 128, 0.2)),
    "full": ((1, 1, 1.0), (65, 33, 0.5), (40, 64, 0.0), (24, 96, 1.0), (256, 1000, 0.1)),
}
TOKENS = {"tiny": (1, 17), "small": (1, 17), "full": (1, 7, 16, 130)}


def cases(scale: str, device: torch.device) -> Iterator[Case]:
    for shape in SHAPES[scale]:
        for dtype in (torch.float32, torch.bfloat16):
            crow_indices, col_indices = pattern(*shape, device)
            for tokens in TOKENS[scale]:
                yield from _products(crow_indices, col_indices, shape, tokens, dtype, device)
            yield from _bits(crow_indices, col_indices, shape, dtype, device)


def _products(
    crow_indices: Tensor, col_indices: Tensor, shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    rows, columns, _ = shape
    draw = partial(numbers, dtype=dtype, device=device)
    values, bias, x, dy = draw(col_indices.numel()), draw(rows), draw(tokens, columns), draw(tokens, rows)
    name = f"{_words(shape, dtype)}, {tokens} tokens"
    counts = crow_indices.diff()[None, :]

    def right(product: Callable[..., Tensor], terms: Tensor, *operands: Tensor) -> tuple[Expected, ...]:
        exact, size = (
            product(crow_indices, col_indices, *(by(one.double()) for one in operands))
            for by in (torch.clone, torch.abs)
        )
        return (sums(exact, size, terms, dtype),)

    yield Case(
        "spmm",
        name,
        lambda: sparse_weight.spmm(crow_indices, col_indices, values, x, bias),
        lambda: right(reference.spmm, counts + 1, values, x, bias),
        (values, x),
    )
    yield Case(
        "spmm",
        f"{name}, feature-major",
        lambda: sparse_weight.spmm(crow_indices, col_indices, values, x.t().contiguous().t(), None, True),
        lambda: right(reference.spmm, counts, values, x),
        (values, x),
    )
    yield Case(
        "sddmm",
        name,
        lambda: sparse_weight.sddmm(crow_indices, col_indices, dy, x),
        lambda: right(reference.sddmm, torch.tensor(tokens, device=device), dy, x),
        (dy, x),
    )


def _bits(
    crow_indices: Tensor, col_indices: Tensor, shape: Shape, dtype: torch.dtype, device: torch.device
) -> Iterator[Case]:
    rows, columns, _ = shape
    values = numbers(col_indices.numel(), dtype=dtype, device=device)
    matrix = numbers(rows, columns, dtype=dtype, device=device)
    prepared = expand.bitmap(crow_indices, col_indices, columns)
    live = dense(crow_indices, col_indices, torch.ones_like(values), columns).bool()

    def bits() -> Tensor:
        place = torch.arange(columns, device=device)
        words = expand.bitmap(crow_indices, col_indices, columns).words[:, place // 32]
        return (words >> (place % 32).int()) & 1

    name = _words(shape, dtype)
    yield Case("bitmap", name, bits, lambda: (exactly(live),), captured=False)
    yield Case(
        "expand",
        name,
        lambda: expand.expand(prepared, values),
        lambda: (exactly(dense(crow_indices, col_indices, values, columns)),),
        (values,),
    )
    yield Case("compress", name, lambda: expand.compress(prepared, matrix), lambda: (exactly(matrix[live]),), (matrix,))


def _words(shape: Shape, dtype: torch.dtype) -> str:
    rows, columns, density = shape
    return f"{str(dtype).removeprefix('torch.')}, {rows} x {columns} at {1 - density:.0%} sparsity"
