"""A few tokens times a sparse weight: y = x W^T + bias, from the weight's packed form."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from offpath.kernels.gpu.driver import load, shared_bytes_limit
from offpath.kernels.gpu.few_calls import Launches, expect_tokens, launches
from offpath.kernels.gpu.formats import STRIDE, Kind, Packed
from offpath.kernels.gpu.n4 import GROUP

MAX_TOKENS = 8
PREFETCH = 32  # groups
# Tokens: warps of a block, blocks that should fit on a multiprocessor, groups that each lane has in flight. These were
# the quickest on an H200.
TILES = {1: (32, 1, 2), 2: (32, 1, 2), 4: (32, 1, 2), 8: (32, 1, 1)}


def decode(packed: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [tokens, rows] of x [tokens, columns], at most 8 tokens, for the weight `packed` on the same device.

    `x` and `bias` [rows] have the dtype of the weight's values; sums are float32, and rounded once, after the bias is
    added. A column where a row has no connection does not touch its output, whatever `x` holds there. Equal calls give
    equal bits. May be captured in a CUDA graph once it has run. Raises `KernelError` for other shapes, dtypes, strides
    or devices, and for what `driver.load` needs.
    """
    expect_tokens(packed.values, packed.shape, x, bias, MAX_TOKENS, columns=packed.columns, gaps=packed.gaps)
    rows, columns = packed.shape
    y = x.new_empty(x.shape[0], rows)
    if not y.numel():
        return y
    plan = _plan(packed.kind, x.dtype, columns, 1 << (x.shape[0] - 1).bit_length(), x.device)
    for first in range(0, x.shape[0], plan.batch):
        plan.kernel.launch(
            (min(plan.resident_blocks, rows), 1),
            plan.threads,
            plan.shared_bytes,
            packed.values.data_ptr(),
            packed.columns.data_ptr(),
            0 if packed.gaps is None else packed.gaps.data_ptr(),
            packed.group_offsets.data_ptr(),
            x.data_ptr() + first * columns * x.element_size(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr() + first * rows * y.element_size(),
            rows,
            columns,
            min(plan.batch, x.shape[0] - first),
            packed.values.numel() // GROUP,
        )
    return y


def shared_bytes_of(columns: int, batch: int, dtype: torch.dtype) -> int:
    """How much shared memory `batch` tokens take while they wait for the weight."""
    # One token of bfloat16 waits as float32.
    return (columns + GROUP * STRIDE) * max(4, batch * dtype.itemsize)


@lru_cache(maxsize=1024)
def _plan(kind: Kind, dtype: torch.dtype, columns: int, tokens: int, device: torch.device) -> Launches:
    batch, most = tokens, shared_bytes_limit(device)
    while shared_bytes_of(columns, batch, dtype) > most and batch > 1:
        batch //= 2
    shared_bytes = shared_bytes_of(columns, batch, dtype)
    staged = shared_bytes <= most
    if not staged:
        batch, shared_bytes = tokens, 0
    warps, blocks, depth = TILES[batch]
    kernel = load(
        "decode.cu",
        "decode",
        device,
        BATCH=batch,
        N4=int(kind == "n4"),
        BF16=int(dtype is torch.bfloat16),
        STAGED=int(staged),
        STRIDE=STRIDE,
        WARPS=warps,
        BLOCKS=blocks,
        DEPTH=depth,
        PREFETCH=PREFETCH,
    )
    return launches(kernel, batch, warps, shared_bytes)
