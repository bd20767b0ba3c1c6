"""Rows of a matrix, gathered by index: their weighted sums, and their dot products with a row of another.

Both loop over a row's entries with scalar loads of the indices and a block of neighbours in registers. With
`num_stages=1`: Triton's pipelining sends these loads through shared memory, at twice the instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from offpath.kernels.gpu.launch import (
    accumulator,
    block_of,
    contiguous_rows,
    device_of,
    expect_indices,
    expect_operands,
    expect_rows,
    expect_shapes,
    warps_of,
    wide_dtype,
)


@triton.jit
def gather_sum_kernel(
    crow_indices,
    indices,
    values,
    weight,
    bias,
    y,
    columns,
    width,
    weight_stride,
    y_stride,
    HAS_BIAS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[row] = bias[row] + sum over the row's entries of value * weight[index]; grid (rows, blocks of the width)."""
    row = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    begin = tl.load(crow_indices + row)
    end = tl.load(crow_indices + row + 1)
    total = tl.zeros([BLOCK], ACCUMULATOR)
    if HAS_BIAS:
        total += tl.load(bias + row).to(ACCUMULATOR)
    whole = begin + (end - begin) // UNROLL * UNROLL
    for first in range(begin, whole, UNROLL):
        for step in tl.static_range(UNROLL):
            index = tl.load(indices + first + step)
            value = tl.load(values + first + step).to(ACCUMULATOR)
            known = (index >= 0) & (index < columns)
            value = tl.where(known, value, float("nan"))
            source = weight + tl.where(known, index, 0).to(tl.int64) * weight_stride
            total += value * tl.load(source + place, mask=inside, other=0.0).to(ACCUMULATOR)
    for entry in range(whole, end):
        index = tl.load(indices + entry)
        value = tl.load(values + entry).to(ACCUMULATOR)
        known = (index >= 0) & (index < columns)
        value = tl.where(known, value, float("nan"))
        source = weight + tl.where(known, index, 0).to(tl.int64) * weight_stride
        total += value * tl.load(source + place, mask=inside, other=0.0).to(ACCUMULATOR)
    tl.store(y + row.to(tl.int64) * y_stride + place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gather_dot_kernel(
    crow_indices,
    indices,
    dy,
    weight,
    dots,
    nnz,
    columns,
    width,
    dy_stride,
    weight_stride,
    ACCUMULATOR: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dots[block, entry] = <dy[row], weight[index]> over one block of the width; grid (rows, blocks of the width)."""
    row = tl.program_id(0)
    block = tl.program_id(1)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    begin = tl.load(crow_indices + row)
    end = tl.load(crow_indices + row + 1)
    whole = begin + (end - begin) // UNROLL * UNROLL
    wide_dy = tl.load(dy + row.to(tl.int64) * dy_stride + place, mask=inside, other=0.0).to(ACCUMULATOR)
    result = dots + block.to(tl.int64) * nnz
    for first in range(begin, whole, UNROLL):
        for step in tl.static_range(UNROLL):
            index = tl.load(indices + first + step)
            known = (index >= 0) & (index < columns)
            source = weight + tl.where(known, index, 0).to(tl.int64) * weight_stride
            products = tl.load(source + place, mask=inside, other=0.0).to(ACCUMULATOR) * wide_dy
            dot = tl.where(known, tl.sum(products, 0), float("nan"))
            tl.store(result + first + step, dot.to(dots.dtype.element_ty))
    for entry in range(whole, end):
        index = tl.load(indices + entry)
        known = (index >= 0) & (index < columns)
        source = weight + tl.where(known, index, 0).to(tl.int64) * weight_stride
        products = tl.load(source + place, mask=inside, other=0.0).to(ACCUMULATOR) * wide_dy
        dot = tl.where(known, tl.sum(products, 0), float("nan"))
        tl.store(result + entry, dot.to(dots.dtype.element_ty))


def matmul(crow_indices: Tensor, indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """y[b] = sum over the entries of row b of value * weight[index]: `RowProducts.matmul`."""
    expect_operands(values=values, weight=weight)
    expect_shapes(weight.dim() == 2 and values.shape == indices.shape, indices=indices, values=values, weight=weight)
    expect_indices(values, crow_indices=crow_indices, indices=indices)
    expect_rows(crow_indices, indices, weight.shape[0])
    y = values.new_empty(crow_indices.shape[0] - 1, weight.shape[1])
    gather_sum(crow_indices, indices, values, contiguous_rows(weight), y)
    return y


def dots(crow_indices: Tensor, indices: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """<dy[b], weight[index]> for each entry of row b: `RowProducts.dots`."""
    expect_operands(dy=dy, weight=weight)
    expect_indices(dy, crow_indices=crow_indices, indices=indices)
    fit = dy.dim() == weight.dim() == 2 and dy.shape == (crow_indices.shape[0] - 1, weight.shape[1])
    expect_shapes(fit, crow_indices=crow_indices, dy=dy, weight=weight)
    expect_rows(crow_indices, indices, weight.shape[0])
    return gather_dot(crow_indices, indices, contiguous_rows(dy), contiguous_rows(weight))


def gather_sum(
    crow_indices: Tensor, indices: Tensor, values: Tensor, weight: Tensor, y: Tensor, bias: Tensor | None = None
) -> None:
    """Writes y [rows, width], whose rows are contiguous like those of `weight`; the operands have been checked."""
    rows, width = y.shape
    if rows == 0 or width == 0:
        return
    block = block_of(width, 1024)
    with device_of(y):
        gather_sum_kernel[(rows, triton.cdiv(width, block))](
            crow_indices.contiguous(),
            indices.contiguous(),
            values.contiguous(),
            weight,
            values if bias is None else bias.contiguous(),
            y,
            weight.shape[0],
            width,
            weight.stride(0),
            y.stride(0),
            HAS_BIAS=bias is not None,
            ACCUMULATOR=accumulator(y.dtype),
            UNROLL=8,
            BLOCK=block,
            num_warps=warps_of(block, y.dtype, 4),
            num_stages=1,
        )


def gather_dot(crow_indices: Tensor, indices: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """The dots [nnz] of rows that are contiguous; the operands have been checked."""
    (rows, width), nnz = dy.shape, indices.shape[0]
    if rows == 0 or width == 0 or nnz == 0:
        return dy.new_zeros(nnz)
    block = block_of(width, 1024)
    blocks = triton.cdiv(width, block)
    # Parts of a dot product are summed in a fixed order, and rounded once.
    parts = dy.new_empty(blocks, nnz, dtype=dy.dtype if blocks == 1 else wide_dtype(dy.dtype))
    with device_of(dy):
        gather_dot_kernel[(rows, blocks)](
            crow_indices.contiguous(),
            indices.contiguous(),
            dy,
            weight,
            parts,
            nnz,
            weight.shape[0],
            width,
            dy.stride(0),
            weight.stride(0),
            ACCUMULATOR=accumulator(dy.dtype),
            UNROLL=4,
            BLOCK=block,
            num_warps=1,
            num_stages=1,
        )
    return parts[0] if blocks == 1 else parts.sum(0).to(dy.dtype)
