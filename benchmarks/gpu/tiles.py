"""Times of 8 to 64 tokens times a sparse weight: multiplied tile by tile on tensor cores, beside the dense product."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from gpu.cases_tiles import right
from gpu.decode import DENSE_FORMS, SHAPES, Shape, best_dense, dense_calls, words
from gpu.draws import dense, numbers, pattern
from gpu.jobs import Job, Raced, Sides, Wanted, require
from gpu.timing import Effort, copies
from offpath.kernels.gpu import formats
from offpath.kernels.gpu.decode import MAX_TOKENS, decode
from offpath.kernels.gpu.tensor_cores import multiply_tiles
from offpath.kernels.gpu.tiles import pack_tiles
from verdicts import Figure

# Of issue 7: what this product has to reach at 70 %, or go.
BAR, BARRED = 1.1, 0.7
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TOKENS = (8, 16, 32, 64)
OURS, DECODED = "offpath", "offpath, decoded"


def jobs(quick: bool, effort: Effort, device: torch.device) -> Iterator[Job]:
    shapes, sparsities, tokens = (SHAPES, SPARSITIES, TOKENS) if not quick else (((1024, 1024),), (BARRED,), (16,))
    for count in tokens:
        for shape in shapes:
            for sparsity in sparsities:
                bar = BAR if sparsity == BARRED and shape == SHAPES[0] else None
                figure = Figure(section(count), words(shape), f"{sparsity:.0%}", bar)
                measure = partial(_multiply, shape, sparsity, count, effort, device)
                yield Job((Wanted(figure, OURS, DENSE_FORMS[:2]),), ("multiply_tiles",), measure)


def section(tokens: int) -> str:
    return f"Sparse weight in tiles, {tokens} tokens, over the best dense bf16"


def _multiply(shape: Shape, sparsity: float, tokens: int, effort: Effort, device: torch.device) -> Raced:
    crow_indices, col_indices = pattern(*shape, 1 - sparsity, device)
    values = numbers(col_indices.numel(), dtype=torch.bfloat16, device=device)
    weight = dense(crow_indices, col_indices, values, shape[1])
    x = numbers(tokens, shape[1], dtype=torch.bfloat16, device=device)
    tiles = pack_tiles(crow_indices, col_indices, values, shape[1])
    (expected,) = right(weight.double(), x, None, crow_indices.diff())
    require("the product with tiles", multiply_tiles(tiles, x), expected)
    form = best_dense(shape, tokens, effort, device)
    sides = Sides(
        {
            OURS: [partial(multiply_tiles, each, x) for each in copies(tiles, tiles.n_bytes)],
            form: dense_calls(form, copies(weight, weight.nbytes), x),
        }
    )
    if tokens <= MAX_TOKENS:
        packed = formats.pack(crow_indices, col_indices, values, shape[1])
        sides.calls[DECODED] = [partial(decode, each, x) for each in copies(packed, packed.n_bytes)]
    return sides.race(effort)
