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
    blocks_of,
    contiguous_rows,
    expect_indices,
    expect_operands,
    expect_rows,
    expect_shapes,
    launch,
    wide_dtype,
)


@triton.jit
def load_part(row, place, width, WHOLE: tl.constexpr):
    """The places of a row that are inside its width; WHOLE: all are."""
    if WHOLE:
        return tl.load(row + place)
    return tl.load(row + place, mask=place < width, other=0.0)


@triton.jit
def named_row(weight, index, columns, stride, TRUSTED: tl.constexpr):
    """(whether there is such a row, where it begins); without TRUSTED, an index out of range reads row 0."""
    known = True
    if not TRUSTED:
        known = (index >= 0) & (index < columns)
        index = tl.where(known, index, 0)
    return known, weight + index.to(tl.int64) * stride


@triton.jit
def row_bounds(crow_indices, row, nnz, TRUSTED: tl.constexpr):
    """(whether there is such a row, its first entry, the one after its last); a row that is none has no entries.

    The first row has to begin with the first entry and the last one to end with the last, so that all belong to one.
    """
    begin = tl.load(crow_indices + row)
    end = tl.load(crow_indices + row + 1)
    known = True
    if not TRUSTED:
        known = (begin >= 0) & (begin <= end) & (end <= nnz) & ((begin == 0) | (row > 0))
        known = known & ((end == nnz) | (row < tl.num_programs(0) - 1))
        end = tl.where(known, end, begin)
    return known, begin, end


@triton.jit
def _term(entry, indices, values, weight, columns, weight_stride, place, width, ACCUMULATOR, WHOLE, TRUSTED):
    known, row = named_row(weight, tl.load(indices + entry), columns, weight_stride, TRUSTED)
    value = tl.load(values + entry).to(ACCUMULATOR)
    if not TRUSTED:
        value = tl.where(known, value, float("nan"))
    return value * load_part(row, place, width, WHOLE).to(ACCUMULATOR)


@triton.jit
def gather_sum_kernel(
    crow_indices,
    indices,
    values,
    weight,
    bias,
    y,
    nnz,
    columns,
    width,
    weight_stride,
    y_stride,
    HAS_BIAS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    TRUSTED: tl.constexpr,
    WHOLE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[row] = bias[row] + sum over the row's entries of value * weight[index]; grid (rows, blocks of the width)."""
    row = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known, begin, end = row_bounds(crow_indices, row, nnz, TRUSTED)
    sums = tl.zeros([BLOCK], ACCUMULATOR)
    if HAS_BIAS:
        sums += tl.load(bias + row).to(ACCUMULATOR)
    unrolled = begin + (end - begin) // UNROLL * UNROLL
    for first in range(begin, unrolled, UNROLL):
        for step in tl.static_range(UNROLL):
            entry = first + step
            sums += _term(
                entry, indices, values, weight, columns, weight_stride, place, width, ACCUMULATOR, WHOLE, TRUSTED
            )
    for entry in range(unrolled, end):
        sums += _term(entry, indices, values, weight, columns, weight_stride, place, width, ACCUMULATOR, WHOLE, TRUSTED)
    if not TRUSTED:
        sums = tl.where(known, sums, float("nan"))
    target = y + row.to(tl.int64) * y_stride + place
    tl.store(target, sums.to(y.dtype.element_ty), mask=None if WHOLE else place < width)


@triton.jit
def _dot(entry, indices, wide_dy, weight, columns, weight_stride, place, width, WHOLE, TRUSTED):
    known, row = named_row(weight, tl.load(indices + entry), columns, weight_stride, TRUSTED)
    dot = tl.sum(load_part(row, place, width, WHOLE).to(wide_dy.dtype) * wide_dy, 0)
    return dot if TRUSTED else tl.where(known, dot, float("nan"))


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
    TRUSTED: tl.constexpr,
    WHOLE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dots[block, entry] = <dy[row], weight[index]> over one block of the width; grid (rows, blocks of the width)."""
    row = tl.program_id(0)
    block = tl.program_id(1)
    place = block * BLOCK + tl.arange(0, BLOCK)
    _, begin, end = row_bounds(crow_indices, row, nnz, TRUSTED)
    wide_dy = load_part(dy + row.to(tl.int64) * dy_stride, place, width, WHOLE).to(ACCUMULATOR)
    result = dots + block.to(tl.int64) * nnz
    unrolled = begin + (end - begin) // UNROLL * UNROLL
    for first in range(begin, unrolled, UNROLL):
        for step in tl.static_range(UNROLL):
            entry = first + step
            dot = _dot(entry, indices, wide_dy, weight, columns, weight_stride, place, width, WHOLE, TRUSTED)
            tl.store(result + entry, dot.to(dots.dtype.element_ty))
    for entry in range(unrolled, end):
        dot = _dot(entry, indices, wide_dy, weight, columns, weight_stride, place, width, WHOLE, TRUSTED)
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
    crow_indices: Tensor,
    indices: Tensor,
    values: Tensor,
    weight: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
    trusted: bool = False,
) -> None:
    """Writes y [rows, width], whose rows are contiguous like those of `weight`; the operands have been checked.

    `trusted`: so have the contents of the indices.
    """
    rows, width = y.shape
    if rows == 0 or width == 0:
        return
    # One load of 16 bytes for each lane of one warp: as the second-level cache then holds more of a narrow strip of a
    # large weight, this beat every wider block.
    block = block_of(width, 512 // y.element_size())
    launch(
        gather_sum_kernel,
        (rows, blocks_of(width, block)),
        crow_indices.contiguous(),
        indices.contiguous(),
        values.contiguous(),
        weight,
        values if bias is None else bias.contiguous(),
        y,
        indices.shape[0],
        weight.shape[0],
        width,
        weight.stride(0),
        y.stride(0),
        HAS_BIAS=bias is not None,
        ACCUMULATOR=accumulator(y.dtype),
        TRUSTED=trusted,
        WHOLE=width % block == 0,
        UNROLL=8,
        BLOCK=block,
        num_warps=1,
        num_stages=1,
    )


def gather_dot(crow_indices: Tensor, indices: Tensor, dy: Tensor, weight: Tensor, trusted: bool = False) -> Tensor:
    """The dots [nnz] of rows that are contiguous; the operands have been checked, if `trusted` the indices, too."""
    (rows, width), nnz = dy.shape, indices.shape[0]
    if rows == 0 or width == 0 or nnz == 0:
        return dy.new_zeros(nnz)
    block = block_of(width, 2048 // dy.element_size())  # more for a lane to sum before lanes are summed
    blocks = blocks_of(width, block)
    # Parts of a dot product are summed in a fixed order, and rounded once. An entry that is in no row keeps NaN.
    parts = dy.new_empty(blocks, nnz, dtype=dy.dtype if blocks == 1 else wide_dtype(dy.dtype))
    if not trusted:
        parts.fill_(float("nan"))
    launch(
        gather_dot_kernel,
        (rows, blocks),
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
        TRUSTED=trusted,
        WHOLE=width % block == 0,
        UNROLL=4,
        BLOCK=block,
        num_warps=1,
        num_stages=1,
    )
    return parts[0] if blocks == 1 else parts.sum(0).to(dy.dtype)
