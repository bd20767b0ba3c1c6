"""Products of a few tokens with a sparse weight: along its rows, and what is read of a row serves several tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from offpath.kernels.gpu.launch import accumulator, launch, parts_of, power_of_two_from

# Under this many tokens, a warp has too few neighbours to load where activations lie by feature.
FEW_TOKENS = 16
# Tokens and slots that a warp works on at a time: 32 sums for each of its lanes.
MOST_AT_ONCE, BLOCK = 8, 128


@triton.jit
def _gathered(x, x_stride, token, tokens, index, known, ACCUMULATOR: tl.constexpr):
    """x[token, index], [TOKENS, BLOCK]; zero where there is no such token or input."""
    source = x + token.to(tl.int64)[:, None] * x_stride + tl.where(known, index, 0)[None, :]
    return tl.load(source, mask=(token < tokens)[:, None] & known[None, :], other=0.0).to(ACCUMULATOR)


@triton.jit
def few_tokens_kernel(
    crow_indices,
    indices,
    values,
    x,
    bias,
    y,
    columns,
    rows,
    tokens,
    x_stride,
    HAS_BIAS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[token, row] = bias[row] + sum over the row's slots of value * x[token, index].

    Grid (rows, blocks of tokens).
    """
    row = tl.program_id(0)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    begin = tl.load(crow_indices + row)
    end = tl.load(crow_indices + row + 1)
    sums = tl.zeros([TOKENS, BLOCK], ACCUMULATOR)
    for first in range(begin, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        live = slot < end
        index = tl.load(indices + slot, mask=live, other=0)
        known = live & (index >= 0) & (index < columns)
        value = tl.load(values + slot, mask=live, other=0.0).to(ACCUMULATOR)
        value = tl.where(known | ~live, value, float("nan"))
        sums += value[None, :] * _gathered(x, x_stride, token, tokens, index, known, ACCUMULATOR)
    result = tl.sum(sums, 1)
    if HAS_BIAS:
        result += tl.load(bias + row).to(ACCUMULATOR)
    tl.store(y + token.to(tl.int64) * rows + row, result.to(y.dtype.element_ty), mask=token < tokens)


@triton.jit
def few_dots_kernel(
    crow_indices,
    indices,
    dy,
    x,
    dvalues,
    columns,
    tokens,
    dy_stride,
    x_stride,
    ACCUMULATOR: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dvalues[slot] = sum over the tokens of dy[token, row] * x[token, index]; grid (rows)."""
    row = tl.program_id(0)
    begin = tl.load(crow_indices + row)
    end = tl.load(crow_indices + row + 1)
    for first in range(begin, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        live = slot < end
        index = tl.load(indices + slot, mask=live, other=0)
        known = live & (index >= 0) & (index < columns)
        sums = tl.zeros([TOKENS, BLOCK], ACCUMULATOR)
        for first_token in range(0, tokens, TOKENS):
            token = first_token + tl.arange(0, TOKENS)
            source = dy + token.to(tl.int64) * dy_stride + row
            factor = tl.load(source, mask=token < tokens, other=0.0).to(ACCUMULATOR)
            sums += factor[:, None] * _gathered(x, x_stride, token, tokens, index, known, ACCUMULATOR)
        dots = tl.where(known, tl.sum(sums, 0), float("nan"))
        tl.store(dvalues + slot, dots.to(dvalues.dtype.element_ty), mask=live)


def spmm_of_few(crow_indices: Tensor, col_indices: Tensor, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """`Spmm` for x [few tokens, columns] whose rows are contiguous; the operands have been checked."""
    (tokens, columns), rows = x.shape, crow_indices.shape[0] - 1
    y = values.new_empty(tokens, rows)
    if y.numel() == 0:
        return y
    at_once = _at_once(tokens)
    launch(
        few_tokens_kernel,
        (rows, parts_of(tokens, at_once)),
        crow_indices.contiguous(),
        col_indices.contiguous(),
        values.contiguous(),
        x,
        values if bias is None else bias.contiguous(),
        y,
        columns,
        rows,
        tokens,
        x.stride(0),
        HAS_BIAS=bias is not None,
        ACCUMULATOR=accumulator(y.dtype),
        TOKENS=at_once,
        BLOCK=BLOCK,
        num_warps=1,
        num_stages=1,
    )
    return y


def sddmm_of_few(crow_indices: Tensor, col_indices: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    """`Sddmm` for dy and x [few tokens, features] whose rows are contiguous; the operands have been checked."""
    (tokens, rows), nnz = dy.shape, col_indices.shape[0]
    if tokens == 0 or nnz == 0:
        return dy.new_zeros(nnz)
    dvalues = dy.new_empty(nnz)
    launch(
        few_dots_kernel,
        (rows,),
        crow_indices.contiguous(),
        col_indices.contiguous(),
        dy,
        x,
        dvalues,
        x.shape[1],
        tokens,
        dy.stride(0),
        x.stride(0),
        ACCUMULATOR=accumulator(dy.dtype),
        TOKENS=_at_once(tokens),
        BLOCK=BLOCK,
        num_warps=1,
        num_stages=1,
    )
    return dvalues


def _at_once(tokens: int) -> int:
    return min(power_of_two_from(tokens), MOST_AT_ONCE)
