"""Sparse rows so full that their zeros are written out: without a look at the indices, which would wait for the device.

As everywhere on a GPU, an index out of range, or an entry of no row, reads and writes nothing outside, and makes what
it would add to NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from offpath.kernels.gpu.counting_sort import begun
from offpath.kernels.gpu.launch import (
    accumulator,
    expect_indices,
    expect_operands,
    expect_rows,
    expect_shapes,
    launch,
    parts_of,
)
from offpath.kernels.operands import in_own_dtype

BLOCK = 256


@triton.jit
def write_kernel(
    places,
    entries,
    indices,
    begun,
    values,
    dense,
    nnz,
    rows,
    columns,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dense[place] = sum of the values at it, in the order of the batch; `places` ascend, grid (blocks of entries).

    The first of neighbours at one place writes for all of them.
    """
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < nnz
    place = tl.load(places + position, mask=inside, other=-1)
    before = tl.load(places + position - 1, mask=inside & (position > 0), other=-1)
    first = inside & (place != before)
    sums = tl.zeros([BLOCK], ACCUMULATOR)
    here = first
    while tl.max(here.to(tl.int32), 0) > 0:
        entry = tl.load(entries + position, mask=here, other=0)
        index = tl.load(indices + entry, mask=here, other=0)
        row = tl.load(begun + entry, mask=here, other=1) - 1
        known = (index >= 0) & (index < columns) & (row >= 0) & (row < rows)
        value = tl.load(values + entry, mask=here, other=0.0).to(ACCUMULATOR)
        sums += tl.where(known, value, float("nan"))
        position += 1
        here = here & (position < nnz)
        here = here & (tl.load(places + position, mask=here, other=-1) == place)
    tl.store(dense + place, sums.to(dense.dtype.element_ty), mask=first)


def written_out(crow_indices: Tensor, indices: Tensor, values: Tensor, columns: int) -> Tensor:
    """The rows with their zeros, [rows, columns]: `RowProducts.written_out`."""
    expect_operands(values=values)
    expect_indices(values, crow_indices=crow_indices, indices=indices)
    expect_shapes(values.shape == indices.shape, indices=indices, values=values)
    expect_rows(crow_indices, indices, columns)
    rows, nnz = crow_indices.shape[0] - 1, indices.shape[0]
    dense = values.new_zeros(rows, columns)
    if nnz == 0:
        return dense
    rows_begun = _begun(crow_indices, nnz)
    row = (rows_begun.long() - 1).clamp_(0, rows - 1)
    places, entries = (row * columns + indices.clamp(0, columns - 1)).sort(stable=True)
    launch(
        write_kernel,
        (parts_of(nnz, BLOCK),),
        places,
        entries,
        indices.contiguous(),
        rows_begun,
        values.contiguous(),
        dense,
        nnz,
        rows,
        columns,
        ACCUMULATOR=accumulator(values.dtype),
        BLOCK=BLOCK,
        num_warps=4,
        num_stages=1,
    )
    return dense


def dense_dots(crow_indices: Tensor, indices: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """`dots` by all products of a row of dy with one of the weight: `RowProducts.dense_dots`."""
    expect_operands(dy=dy, weight=weight)
    expect_indices(dy, crow_indices=crow_indices, indices=indices)
    expect_rows(crow_indices, indices, weight.shape[0])
    if indices.shape[0] == 0:
        return dy.new_zeros(0)
    rows = _begun(crow_indices, indices.shape[0]).sub_(1)
    places = rows.clamp(0, dy.shape[0] - 1).long(), indices.clamp(0, weight.shape[0] - 1).long()
    known = (indices >= 0) & (indices < weight.shape[0]) & (rows >= 0) & (rows < dy.shape[0])
    with in_own_dtype(dy):
        products = dy @ weight.t()
    return torch.where(known, products[places], torch.nan)


def _begun(crow_indices: Tensor, nnz: int) -> Tensor:
    return begun(crow_indices, torch.arange(nnz, device=crow_indices.device))
