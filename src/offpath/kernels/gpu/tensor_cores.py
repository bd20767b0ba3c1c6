"""8 to 64 tokens times a sparse weight in tiles: loaded sparse, multiplied densely on tensor cores."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from offpath.kernels.errors import KernelError
from offpath.kernels.gpu.driver import load, shared_bytes_limit
from offpath.kernels.gpu.few_calls import Launches, expect_tokens, launches
from offpath.kernels.gpu.n4 import GROUP
from offpath.kernels.gpu.reduce import sum_parts
from offpath.kernels.gpu.tiles import STRIDE, TILE_COLUMNS, TILE_ROWS, Tiles

MAX_TILED_TOKENS = 64
# Tokens: warps of a block, blocks that should fit on a multiprocessor, groups that each thread has in flight.
LAUNCHES = {8: (8, 3, 4), 16: (8, 2, 5), 32: (8, 2, 4), 64: (8, 1, 5)}
_CHUNK = 8  # columns in 16 bytes


def multiply_tiles(tiles: Tiles, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [tokens, rows] of x [tokens, columns], at most 64 tokens, for the weight `tiles` on the same device.

    `x` and `bias` [rows] are bfloat16; sums are float32, as tensor cores add, and rounded once, after the bias is
    added. As in a dense product, what is not finite in `x` reaches every output of its token. Equal calls give equal
    bits. May be captured in a CUDA graph once it has run. Raises `KernelError` for other shapes, dtypes, strides or
    devices, and for what `driver.load` needs.
    """
    expect_tokens(tiles.values, tiles.shape, x, bias, MAX_TILED_TOKENS, (torch.bfloat16,))
    (rows, columns), tokens = tiles.shape, x.shape[0]
    y = x.new_empty(tokens, rows)
    if not y.numel():
        return y
    if columns == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    if columns % _CHUNK or x.data_ptr() % 16:
        x = functional.pad(x, (0, -columns % _CHUNK)).clone()
    plan = _plan(1 << max(tokens - 1, 7).bit_length(), x.device)
    blocks, across = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    parts = max(1, min(plan.resident_blocks // blocks, across))
    for first in range(0, tokens, plan.batch):
        some = slice(first, first + plan.batch)
        count = min(plan.batch, tokens - first)
        partial = torch.empty(parts, count, rows, dtype=torch.float32, device=x.device)
        plan.kernel.launch(
            (blocks, parts),
            plan.threads,
            plan.shared_bytes,
            *(tiles.values.data_ptr(), tiles.places.data_ptr(), tiles.gaps.data_ptr(), tiles.group_offsets.data_ptr()),
            *(x[some].data_ptr(), partial.data_ptr(), rows, x.shape[1] // _CHUNK, count),
        )
        sum_parts(partial, bias, y[some])
    return y


def shared_bytes_of(tokens: int) -> int:
    """The shared memory of a block: two tiles, and for each of them the x of `tokens` tokens."""
    return 2 * (TILE_ROWS * TILE_COLUMNS + GROUP * STRIDE) * 2 + 2 * tokens * (TILE_COLUMNS * 2 + 64)


@lru_cache(maxsize=64)
def _plan(tokens: int, device: torch.device) -> Launches:
    most = shared_bytes_limit(device)
    while shared_bytes_of(tokens) > most and tokens > min(LAUNCHES):
        tokens //= 2
    shared_bytes = shared_bytes_of(tokens)
    if shared_bytes > most:
        raise KernelError(
            f"expected a GPU with {shared_bytes:,} bytes of shared memory for a block, got one with {most:,}; take the "
            "dense weight for more than 8 tokens"
        )
    kernel = load("tiles.cu", "multiply_tiles", device, **defines_of(tokens))
    return launches(kernel, tokens, LAUNCHES[tokens][0], shared_bytes)


def defines_of(tokens: int) -> dict[str, int]:
    """The options that the source is compiled with for 8, 16, 32 or 64 tokens."""
    warps, blocks, depth = LAUNCHES[tokens]
    tile = {"TILE_ROWS": TILE_ROWS, "TILE_COLUMNS": TILE_COLUMNS, "STRIDE": STRIDE}
    return {"BF16": 1, "TOKENS": tokens, "WARPS": warps, "BLOCKS": blocks, "DEPTH": depth, **tile}
