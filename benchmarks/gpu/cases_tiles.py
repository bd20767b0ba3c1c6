"""Cases of the product on tensor cores with a sparse weight in tiles."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from gpu.cases_decode import Shape
from gpu.check import Case, exactly, sums
from gpu.draws import dense, numbers, pattern
from offpath.cost.bounds import Expected
from offpath.kernels.gpu.tensor_cores import multiply_tiles
from offpath.kernels.gpu.tiles import pack_tiles, unpack_tiles

# Cut-off tiles, full ones, empty ones, and rows of x that do not begin at multiples of 16 bytes.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "small": ((1, 1, 1.0), (70, 300, 0.3), (40, 64, 0.0)),
    "full": ((1, 1, 1.0), (65, 33, 0.5), (40, 64, 0.0), (64, 256, 1.0), (300, 1000, 0.01), (256, 4096, 0.3),
             (2000, 520, 0.1), (70, 65544, 0.05)),
}  # fmt: skip
TOKENS = {"small": (3, 16), "full": (1, 8, 13, 16, 32, 64)}


def cases(scale: str, device: torch.device) -> Iterator[Case]:
    """None in Triton's interpreter: these are CUDA kernels."""
    for shape in SHAPES.get(scale, ()):
        rows, columns, density = shape
        crow_indices, col_indices = pattern(*shape, device)
        draw = partial(numbers, dtype=torch.bfloat16, device=device)
        values = draw(col_indices.numel())
        connections = crow_indices, col_indices, values
        name = f"{rows} x {columns} at {1 - density:.0%} sparsity"
        yield Case(
            "pack_tiles",
            name,
            lambda connections=connections, columns=columns: unpack_tiles(pack_tiles(*connections, columns)),
            lambda connections=connections: tuple(map(exactly, connections)),
            captured=False,
        )
        tiles = pack_tiles(*connections, columns)
        matrix = dense(*connections, columns).double()
        for tokens in TOKENS[scale]:
            x, bias = draw(tokens, columns), draw(rows)
            yield Case(
                "multiply_tiles",
                f"{name}, {tokens} tokens",
                partial(multiply_tiles, tiles, x, bias),
                partial(right, matrix, x.clone(), bias, crow_indices.diff()),
                (x, bias),
            )


def right(matrix: Tensor, x: Tensor, bias: Tensor | None, row_counts: Tensor) -> tuple[Expected, ...]:
    """What tensor cores may come to.

    They cut off what does not fit beside the largest of the numbers that they add at once, which are 16 products and
    the sum before (Fasi, Higham, Mikaitis & Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021): twice the
    error of rounding, for each connection and for each step of 16 columns. Zeros lose nothing.
    """
    exact, size = x.double() @ matrix.t(), x.double().abs() @ matrix.abs().t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    terms = 2 * (row_counts + matrix.shape[1] // 16 + 1) + 1
    return (sums(exact, size, terms[None, :], torch.bfloat16),)
