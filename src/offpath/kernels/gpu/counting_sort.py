"""Products that go by what an index names: the entries are sorted by it, then each named row has one writer.

So nothing is added atomically, and the same input gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from offpath.kernels.errors import KernelError
from offpath.kernels.gpu.gather import load_part
from offpath.kernels.gpu.launch import (
    accumulator,
    block_of,
    blocks_of,
    contiguous_rows,
    described,
    expect_indices,
    expect_operands,
    expect_rows,
    expect_shapes,
    launch,
    wide_dtype,
)
from offpath.kernels.one_pass import once_in_a_pass


@dataclass(frozen=True)
class Named:
    """The entries that name each of some places, in their order in the batch.

    Those of place i are `entries[starts[i] : starts[i + 1]]`; `begun` has at the same positions how many rows begin
    before or at each of them, one more than its row.
    """

    starts: Tensor  # int32 [columns + 1]
    entries: Tensor  # int64 [nnz]
    begun: Tensor  # int32 [nnz]


def named(crow_indices: Tensor, indices: Tensor, columns: int) -> Named:
    """Which entries name each place in [0, columns); entries out of that range belong to none."""
    starts, entries = once_in_a_pass(sort, indices, columns)
    return Named(starts, entries, begun(crow_indices, entries))


def begun(crow_indices: Tensor, entries: Tensor) -> Tensor:
    """How many rows begin before or at each of the entries [nnz], int32: one more than the row that an entry is in.

    Where rows do not follow one another, 0 or more than there are rows for an entry that is in none.
    """
    return torch.searchsorted(crow_indices.long(), entries, right=True, out_int32=True)


def sort(indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """(`starts`, `entries`) of `Named`: an encoder's gradients and its decoder's are those of the same entries."""
    places, entries = indices.sort(stable=True)
    bounds = torch.arange(columns + 1, dtype=torch.int32, device=indices.device)
    return torch.searchsorted(places, bounds, out_int32=True), entries


def counts(indices: Tensor, columns: int) -> Tensor:
    """How many entries each place has, int32 [columns]: `RowProducts.counts`."""
    expect_indices(indices, indices=indices)
    # Made on the device: a copy from the host would wait for it, which no graph can capture.
    whole = torch.arange(2, dtype=torch.int32, device=indices.device) * indices.shape[0]
    expect_rows(whole, indices, columns)
    bounds = torch.arange(columns + 1, dtype=torch.int32, device=indices.device)
    return torch.searchsorted(indices.sort().values, bounds, out_int32=True).diff()


@triton.jit
def gather_by_name_kernel(
    starts,
    entries,
    begun,
    values,
    dy,
    weight,
    gradient,
    dots,
    totals,
    nnz,
    rows,
    width,
    dy_stride,
    weight_stride,
    gradient_stride,
    ADD: tl.constexpr,
    DOTS: tl.constexpr,
    TOTALS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """gradient[name] = sum over the entries at it of value * dy[row]; with DOTS, <dy[row], weight[name]> for each too.

    `values` stand in the order of the names, dots in that of the batch. With TOTALS, totals[name] is the sum of the
    values. With ADD, the sum is added to the gradient, and rows without an entry are not touched. Grid (names, blocks
    of the width).
    """
    name = tl.program_id(0)
    block = tl.program_id(1)
    place = block * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(starts + name)
    end = tl.load(starts + name + 1)
    if begin < end or not ADD:
        sums = tl.zeros([BLOCK], ACCUMULATOR)
        total = tl.full([], 0.0, ACCUMULATOR)
        if DOTS:
            # Read once for all its entries, and not at all where there is none.
            source = weight + name.to(tl.int64) * weight_stride + place
            wide_weight = tl.load(source, mask=(place < width) & (begin < end), other=0.0).to(ACCUMULATOR)
        for position in range(begin, end):
            value = tl.load(values + position).to(ACCUMULATOR)
            row = tl.load(begun + position).to(tl.int64) - 1
            in_row = (row >= 0) & (row < rows)
            value = tl.where(in_row, value, float("nan"))
            row = tl.where(in_row, row, 0)
            wide_dy = load_part(dy + row * dy_stride, place, width, WHOLE).to(ACCUMULATOR)
            sums += value * wide_dy
            if TOTALS:
                total += value
            if DOTS:
                dot = tl.where(in_row, tl.sum(wide_dy * wide_weight, 0), float("nan"))
                tl.store(dots + block.to(tl.int64) * nnz + tl.load(entries + position), dot)
        target = gradient + name.to(tl.int64) * gradient_stride
        if ADD:
            sums += load_part(target, place, width, WHOLE).to(ACCUMULATOR)
        tl.store(target + place, sums.to(gradient.dtype.element_ty), mask=None if WHOLE else place < width)
        if TOTALS and block == 0:
            tl.store(totals + name, total.to(totals.dtype.element_ty))


def weight_gradient(crow_indices: Tensor, indices: Tensor, values: Tensor, dy: Tensor, columns: int) -> Tensor:
    """Row i is the sum over the entries at i of value * dy[row of the entry]: `RowProducts.weight_gradient`."""
    _expect(crow_indices, indices, values, dy)
    expect_rows(crow_indices, indices, columns)
    gradient = values.new_empty(columns, dy.shape[1])
    _launch(named(crow_indices, indices, columns), values, contiguous_rows(dy), gradient)
    return gradient


def encoder_gradients(
    crow_indices: Tensor, indices: Tensor, values: Tensor, dy: Tensor, columns: int
) -> tuple[Tensor, Tensor]:
    """(`weight_gradient`, the sum of the values at each column) at once: `RowProducts.encoder_gradients`."""
    _expect(crow_indices, indices, values, dy)
    expect_rows(crow_indices, indices, columns)
    if dy.shape[1] == 0:
        totals = weight_gradient(crow_indices, indices, values, dy.new_ones(dy.shape[0], 1), columns)[:, 0]
        return values.new_empty(columns, 0), totals
    gradient, totals = values.new_empty(columns, dy.shape[1]), values.new_empty(columns)
    _launch(named(crow_indices, indices, columns), values, contiguous_rows(dy), gradient, totals=totals)
    return gradient, totals


def add_weight_gradient(crow_indices: Tensor, indices: Tensor, values: Tensor, dy: Tensor, buffer: Tensor) -> None:
    """`weight_gradient`, added to the rows of `buffer` that an entry names: `RowProducts.add_weight_gradient`."""
    _expect(crow_indices, indices, values, dy)
    expect_operands(values=values, buffer=buffer)
    expect_shapes(buffer.dim() == 2 and buffer.shape[1] == dy.shape[1], dy=dy, buffer=buffer)
    expect_rows(crow_indices, indices, buffer.shape[0])
    rows = named(crow_indices, indices, buffer.shape[0])
    target = contiguous_rows(buffer)
    _launch(rows, values, contiguous_rows(dy), target, add=True)
    if target is not buffer:
        buffer.copy_(target)


def row_gradients(
    crow_indices: Tensor, indices: Tensor, values: Tensor, dy: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """(`dots`, `weight_gradient`) at once: each row of `weight` that an entry names is read once."""
    _expect(crow_indices, indices, values, dy)
    expect_operands(values=values, weight=weight)
    expect_shapes(weight.dim() == 2 and weight.shape[1] == dy.shape[1], dy=dy, weight=weight)
    expect_rows(crow_indices, indices, weight.shape[0])
    gradient = values.new_empty(weight.shape)
    dots = _launch(
        named(crow_indices, indices, weight.shape[0]),
        values,
        contiguous_rows(dy),
        gradient,
        weight=contiguous_rows(weight),
    )
    return dots, gradient


def _expect(crow_indices: Tensor, indices: Tensor, values: Tensor, dy: Tensor) -> None:
    expect_operands(values=values, dy=dy)
    expect_indices(values, crow_indices=crow_indices, indices=indices)
    if dy.dim() != 2 or dy.shape[0] != crow_indices.shape[0] - 1 or values.shape != indices.shape:
        got = described(crow_indices=crow_indices, indices=indices, values=values, dy=dy)
        raise KernelError(f"expected a value for each index and a row of dy for each row of entries, got {got}")


def _launch(
    by_name: Named,
    values: Tensor,
    dy: Tensor,
    gradient: Tensor,
    add: bool = False,
    weight: Tensor | None = None,
    totals: Tensor | None = None,
) -> Tensor:
    """Fills `gradient` and `totals`, and returns the dots where there is a `weight`; the operands have been checked."""
    (names, width), nnz = gradient.shape, values.shape[0]
    if names == 0 or width == 0:
        return values.new_zeros(nnz)
    block = block_of(width, 1024 // values.element_size())
    blocks = blocks_of(width, block)
    parts = gradient  # stands for what is not written
    if weight is not None:  # an entry that names nothing keeps NaN, as in `dots`
        parts = values.new_full((blocks, nnz), float("nan"), dtype=wide_dtype(values.dtype))
    launch(
        gather_by_name_kernel,
        (names, blocks),
        by_name.starts,
        by_name.entries,
        by_name.begun,
        values.index_select(0, by_name.entries),
        dy,
        gradient if weight is None else weight,
        gradient,
        parts,
        gradient if totals is None else totals,
        nnz,
        dy.shape[0],
        width,
        dy.stride(0),
        0 if weight is None else weight.stride(0),
        gradient.stride(0),
        ADD=add,
        DOTS=weight is not None,
        TOTALS=totals is not None,
        ACCUMULATOR=accumulator(values.dtype),
        WHOLE=width % block == 0,
        BLOCK=block,
        num_warps=1,
        num_stages=1,
    )
    return parts if weight is None else parts.sum(0).to(values.dtype)
