"""Which of several equal scores are chosen: the first ones, found on the device without a question to it.

Whether a row has more scores that equal the least chosen one than can be chosen, only the device knows. So the kernels
are launched for every row, and return at once from a row that has none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offpath.kernels.gpu.launch import accumulator, block_of, contiguous_rows, expect_operands, launch, parts_of

BLOCK = 2048


@triton.jit
def _has_more(best, row, k, WIDE: tl.constexpr):
    """(the least score that is chosen in this row, whether the next best equals it); NaN is the largest, as all are."""
    least = tl.load(best + row * (k + 1) + k - 1).to(WIDE)
    spare = tl.load(best + row * (k + 1) + k).to(WIDE)
    return least, (spare == least) | (spare != spare)


@triton.jit
def _compared(scores, row, first, columns, stride, least, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """(which scores of a block of the row are larger than the least chosen one, which equal it)."""
    column = first + tl.arange(0, BLOCK)
    inside = column < columns
    score = tl.load(scores + row * stride + column, mask=inside, other=0.0).to(WIDE)
    least = tl.broadcast_to(least, [BLOCK])
    larger = (score > least) | ((score != score) & (least == least))
    equal = (score == least) | ((score != score) & (least != least))
    return inside & larger, inside & equal


@triton.jit
def count_kernel(
    scores,
    best,
    larger_counts,
    equal_counts,
    k,
    columns,
    stride,
    blocks,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many scores of each block are larger than the least chosen one of its row, and how many equal it.

    Grid (rows * blocks). Of a row without ties, nothing is written.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    least, tied = _has_more(best, row, k, WIDE)
    if tied:
        first = program % blocks * BLOCK
        larger, equal = _compared(scores, row, first, columns, stride, least, WIDE, BLOCK)
        tl.store(larger_counts + program, tl.sum(larger.to(tl.int32), 0))
        tl.store(equal_counts + program, tl.sum(equal.to(tl.int32), 0))


@triton.jit
def place_kernel(
    scores,
    best,
    larger_ends,
    equal_ends,
    places,
    k,
    columns,
    stride,
    blocks,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """places[row]: those of the larger scores and of the first equal ones, ascending; the ends are sums of the counts.

    Grid (rows * blocks). Of a row without ties, nothing is written.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    least, tied = _has_more(best, row, k, WIDE)
    if tied:
        first = program % blocks * BLOCK
        larger, equal = _compared(scores, row, first, columns, stride, least, WIDE, BLOCK)
        larger_before = tl.load(larger_ends + program) - tl.sum(larger.to(tl.int32), 0)
        equal_before = tl.load(equal_ends + program) - tl.sum(equal.to(tl.int32), 0)
        # Of the equal ones, in the whole row.
        wanted = tl.maximum(k - tl.load(larger_ends + row * blocks + blocks - 1), 0)
        left = tl.minimum(tl.maximum(wanted - equal_before, 0), BLOCK).to(tl.int32)
        chosen = larger | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
        before = (larger_before + tl.minimum(equal_before, wanted)).to(tl.int32)
        position = before + tl.cumsum(chosen.to(tl.int32), 0) - 1
        # Whoever writes into the scores between the kernels gets other places, but not into other memory.
        chosen = chosen & (position >= 0) & (position < k)
        tl.store(places + row * k + position, first + tl.arange(0, BLOCK), mask=chosen)


def take_first_of_equals(scores: Tensor, best: Tensor, places: Tensor) -> None:
    """Overwrite the ascending `places` [rows, k] of rows where not all scores that equal the least chosen one fit in.

    `best` [rows, k + 1] are the largest of each row of `scores` [rows, columns], descending; k is at least 1.
    """
    expect_operands(scores=scores, best=best)
    (rows, columns), k = scores.shape, places.shape[1]
    if rows == 0:
        return
    scores, best = contiguous_rows(scores), best.contiguous()
    block = block_of(columns, BLOCK)
    blocks = parts_of(columns, block)
    counts = torch.empty(2, rows, blocks, dtype=torch.int32, device=scores.device)
    sizes = k, columns, scores.stride(0), blocks
    options = {"WIDE": accumulator(scores.dtype), "BLOCK": block, "num_warps": 4, "num_stages": 1}
    launch(count_kernel, (rows * blocks,), scores, best, *counts, *sizes, **options)
    launch(place_kernel, (rows * blocks,), scores, best, *counts.cumsum(2), places, *sizes, **options)
