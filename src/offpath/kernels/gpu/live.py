"""A few tokens, many of whose inputs are zero, times a dense weight that is stored by input."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from offpath.kernels.errors import KernelError
from offpath.kernels.gpu.driver import load
from offpath.kernels.gpu.few_calls import Launches, launches
from offpath.kernels.gpu.reduce import sum_parts

MAX_TOKENS = 4
DTYPES = (torch.float32, torch.bfloat16)
# Tokens: warps of a block, blocks that should fit on a multiprocessor, rows that each warp has in flight. These
# were the quickest on an H200.
TILES = {1: (8, 4, 4), 2: (8, 4, 4), 4: (8, 2, 6)}
_LANES = 32
_WORD_BYTES = 16
_LEAST_INPUTS = 64  # of a block


def live_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight + bias [tokens, n_outputs], reading only the rows of `weight` whose input some token uses.

    `x` [at most 4, n_inputs], `weight` [n_inputs, n_outputs] and `bias` [n_outputs], float32 or bfloat16, contiguous,
    on one device; rows of the weight begin at multiples of 16 bytes. Sums are float32, and rounded once, after the bias
    is added. What is zero in every token is not multiplied, so a weight that is not finite matters only where it is
    used. Equal calls give equal bits. May be captured in a CUDA graph once it has run. Raises `KernelError` for other
    operands, and for what `driver.load` needs.
    """
    _check(x, weight, bias)
    tokens, (n_inputs, n_outputs) = x.shape[0], weight.shape
    y = x.new_empty(tokens, n_outputs)
    if not y.numel():
        return y
    plan = _plan(x.dtype, 1 << (tokens - 1).bit_length(), x.device)
    strips = -(-n_outputs // (_LANES * _WORD_BYTES // x.element_size()))
    parts = max(1, min(plan.resident_blocks // strips, n_inputs // _LEAST_INPUTS))
    partial = torch.empty(parts, tokens, n_outputs, dtype=torch.float32, device=x.device)
    plan.kernel.launch(
        (strips, parts),
        plan.threads,
        0,
        *(weight.data_ptr(), x.data_ptr(), partial.data_ptr()),
        *(n_inputs, n_outputs, tokens, -(-n_inputs // parts)),
    )
    sum_parts(partial, bias, y)
    return y


@lru_cache(maxsize=64)
def _plan(dtype: torch.dtype, batch: int, device: torch.device) -> Launches:
    warps, blocks, depth = TILES[batch]
    bf16 = int(dtype is torch.bfloat16)
    kernel = load("live.cu", "live", device, BATCH=batch, BF16=bf16, DEPTH=depth, WARPS=warps, BLOCKS=blocks)
    return launches(kernel, batch, warps, 0)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    operands = [x, weight, *([] if bias is None else [bias])]
    if (
        x.dim() != 2
        or weight.dim() != 2
        or x.shape[0] > MAX_TOKENS
        or x.shape[1] != weight.shape[0]
        or (bias is not None and bias.shape != weight.shape[1:])
        or x.dtype not in DTYPES
        or any(tensor.dtype is not x.dtype or tensor.device != x.device for tensor in operands)
        or not all(tensor.is_contiguous() for tensor in operands)
    ):
        got = ", ".join(
            f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            + ("" if tensor.is_contiguous() else " (not contiguous)")
            for tensor in operands
        )
        raise KernelError(
            f"expected contiguous x [at most {MAX_TOKENS}, n_inputs], weight [n_inputs, n_outputs] and bias "
            f"[n_outputs], all float32 or all bfloat16, on one device; got {got}. Cast or move them, or take "
            "torch.nn.functional.linear for more tokens"
        )
    if weight.shape[1] * weight.element_size() % _WORD_BYTES or weight.data_ptr() % _WORD_BYTES:
        raise KernelError(
            f"expected rows of the weight that begin at multiples of {_WORD_BYTES} bytes, got {weight.shape[1]} "
            f"columns of {weight.dtype} at address {weight.data_ptr():#x}. Pad the outputs"
        )
