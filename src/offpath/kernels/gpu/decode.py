"""A few tokens times a sparse weight: y = x W^T + bias, from the weight's packed form."""

from __future__ import annotations

import torch
from torch import Tensor

from offpath.kernels.errors import KernelError
from offpath.kernels.gpu.driver import Kernel, load
from offpath.kernels.gpu.formats import GROUP, STRIDE, Packed

MAX_TOKENS = 8
_SIGNATURE = "PPPPPPPiiii"
# Tokens: warps of a block, blocks that should fit on a multiprocessor, groups that each lane has in flight.
PREFETCH = 32
TILES = {1: (32, 1, 2), 2: (32, 1, 2), 4: (32, 1, 2), 8: (32, 1, 1)}


def decode(packed: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [tokens, rows] of x [tokens, columns], at most 8 tokens, for the weight `packed` on the same device.

    `x` and `bias` [rows] have the dtype of the weight's values; sums are float32, and rounded once, after the bias is
    added. A column where a row has no connection does not touch its output, whatever `x` holds there. Equal calls give
    equal bits. May be captured in a CUDA graph once it has run. Raises `KernelError` for other shapes, dtypes, strides
    or devices, and for what `driver.load` needs.
    """
    _check(packed, x, bias)
    rows, columns = packed.shape
    y = x.new_empty(x.shape[0], rows)
    kernel, batch, shared_bytes = _kernel(packed, x)
    warps = TILES[batch][0]
    blocks = kernel.resident_blocks(warps * 32, shared_bytes)
    for first in range(0, x.shape[0] if rows else 0, batch):
        tokens = min(batch, x.shape[0] - first)
        kernel.launch(
            (min(blocks, rows), 1),
            warps * 32,
            shared_bytes,
            packed.values.data_ptr(),
            packed.columns.data_ptr(),
            0 if packed.gaps is None else packed.gaps.data_ptr(),
            packed.group_offsets.data_ptr(),
            x[first:].data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y[first:].data_ptr(),
            rows,
            columns,
            tokens,
            packed.values.numel() // GROUP,
        )
    return y


def shared_bytes_of(columns: int, batch: int, dtype: torch.dtype) -> int:
    """How much shared memory `batch` tokens take while they wait for the weight."""
    # One token of bfloat16 waits as float32.
    return (columns + GROUP * STRIDE) * max(4, batch * dtype.itemsize)


def _kernel(packed: Packed, x: Tensor) -> tuple[Kernel, int, int]:
    """The kernel, how many tokens it takes at a time, and its shared memory in bytes."""
    wanted = batch = 1 << (max(x.shape[0], 1) - 1).bit_length()
    most = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    while shared_bytes_of(packed.shape[1], batch, x.dtype) > most and batch > 1:
        batch //= 2
    shared_bytes = shared_bytes_of(packed.shape[1], batch, x.dtype)
    if shared_bytes > most:
        return _load(packed, x.device, wanted, staged=False), wanted, 0
    return _load(packed, x.device, batch, staged=True), batch, shared_bytes


def _load(packed: Packed, device: torch.device, batch: int, staged: bool) -> Kernel:
    warps, blocks, depth = TILES[batch]
    return load(
        "decode.cu",
        "decode",
        _SIGNATURE,
        device,
        BATCH=batch,
        N4=int(packed.kind == "n4"),
        BF16=int(packed.values.dtype is torch.bfloat16),
        STAGED=int(staged),
        STRIDE=STRIDE,
        WARPS=warps,
        BLOCKS=blocks,
        DEPTH=depth,
        PREFETCH=PREFETCH,
    )


def _check(packed: Packed, x: Tensor, bias: Tensor | None) -> None:
    rows, columns = packed.shape
    fits = (
        x.dim() == 2
        and x.shape[0] <= MAX_TOKENS
        and x.shape[1] == columns
        and x.is_contiguous()
        and (bias is None or (bias.shape == (rows,) and bias.is_contiguous()))
    )
    alike = all(
        tensor.dtype is packed.values.dtype and tensor.device == packed.values.device
        for tensor in [x, *([] if bias is None else [bias])]
    )
    if not fits or not alike:
        got = f"x {x.dtype} {tuple(x.shape)} on {x.device}" + (" (not contiguous)" if not x.is_contiguous() else "")
        if bias is not None:
            got += f", bias {bias.dtype} {tuple(bias.shape)} on {bias.device}"
        raise KernelError(
            f"expected contiguous x [at most {MAX_TOKENS}, {columns}] and bias [{rows}] of {packed.values.dtype} on "
            f"{packed.values.device}, where the weight is; got {got}. Cast or move them, or take another product for "
            "more tokens"
        )
