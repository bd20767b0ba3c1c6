"""Products with a sparse weight in CSR: gathers from activations that lie feature by feature.

A connection then reads a run of tokens. For a few tokens there is no such run: their product goes along the row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from offpath.kernels.gpu.few_tokens import FEW_TOKENS, sddmm_of_few, spmm_of_few
from offpath.kernels.gpu.gather import gather_dot, gather_sum
from offpath.kernels.gpu.launch import (
    blocks_of,
    contiguous_rows,
    expect_indices,
    expect_operands,
    expect_rows,
    expect_shapes,
    launch,
    parts_of,
)

# Rows of activations begin at multiples of this many tokens, so that they are loaded 16 bytes a lane.
_ALIGNMENT = 16


def spmm(
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    feature_major: bool = False,
) -> Tensor:
    """y[:, r] = bias[r] + sum over row r's slots s of values[s] * x[:, col_indices[s]]: `Spmm`.

    With `feature_major`, y is a view of [rows, batch] whose rows are contiguous.
    """
    optional = {} if bias is None else {"bias": bias}
    expect_operands(values=values, x=x, **optional)
    expect_indices(values, crow_indices=crow_indices, col_indices=col_indices)
    rows, nnz = crow_indices.shape[0] - 1, col_indices.shape[0]
    fit = values.shape == (nnz,) and x.dim() == 2 and (bias is None or bias.shape == (rows,))
    expect_shapes(fit, crow_indices=crow_indices, col_indices=col_indices, values=values, x=x, **optional)
    expect_rows(crow_indices, col_indices, x.shape[1])
    if x.shape[0] < FEW_TOKENS and not feature_major:
        return spmm_of_few(crow_indices, col_indices, values, contiguous_rows(x), bias)
    batch = x.shape[0]
    by_feature = features_of(x)
    y = values.new_empty(rows, by_feature.shape[1])
    gather_sum(crow_indices, col_indices, values, by_feature, y, bias, trusted=True)
    return y[:, :batch].t() if feature_major else tokens_of(y, batch)


def sddmm(crow_indices: Tensor, col_indices: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    """dvalues[s] = <dy[:, r], x[:, col_indices[s]]> for the slots s of row r: `Sddmm`."""
    expect_operands(dy=dy, x=x)
    expect_indices(dy, crow_indices=crow_indices, col_indices=col_indices)
    fit = dy.dim() == x.dim() == 2 and dy.shape == (x.shape[0], crow_indices.shape[0] - 1)
    expect_shapes(fit, crow_indices=crow_indices, dy=dy, x=x)
    expect_rows(crow_indices, col_indices, x.shape[1])
    if x.shape[0] < FEW_TOKENS:
        return sddmm_of_few(crow_indices, col_indices, contiguous_rows(dy), contiguous_rows(x))
    return gather_dot(crow_indices, col_indices, features_of(dy), features_of(x), trusted=True)


@triton.jit
def transpose_kernel(
    source,
    target,
    rows,
    columns,
    padded,
    source_row_stride,
    source_column_stride,
    target_stride,
    BLOCK: tl.constexpr,
):
    """target[c, r] = source[r, c] for r in rows, zero for r in [rows, padded); grid (blocks of r, blocks of c)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    read = (row < rows)[:, None] & (column < columns)[None, :]
    origin = (
        source + row.to(tl.int64)[:, None] * source_row_stride + column.to(tl.int64)[None, :] * source_column_stride
    )
    tile = tl.trans(tl.load(origin, mask=read, other=0.0))
    written = (column < columns)[:, None] & (row < padded)[None, :]
    tl.store(target + column.to(tl.int64)[:, None] * target_stride + row[None, :], tile, mask=written)


def features_of(x: Tensor) -> Tensor:
    """`x` [batch, features] as [features, batch rounded up], its rows contiguous and aligned; the rest is zero.

    `x` itself where it lies so already.
    """
    batch, features = x.shape
    padded = parts_of(batch, _ALIGNMENT) * _ALIGNMENT
    by_feature = x.t()
    lies_so = by_feature.stride(1) == 1 and by_feature.stride(0) >= batch and by_feature.stride(0) % _ALIGNMENT == 0
    if lies_so and batch == padded and x.data_ptr() % 16 == 0:
        return by_feature
    target = x.new_empty(features, padded)
    transpose(x, target)
    return target


def lay_by_feature(x: Tensor) -> Tensor:
    """`x` [batch, features], lying so that `features_of` need not copy it, where products of so many tokens do."""
    batch = x.shape[0]
    return x if batch < FEW_TOKENS or batch % _ALIGNMENT else features_of(x).t()


def tokens_of(y: Tensor, batch: int) -> Tensor:
    """The first `batch` columns of `y` [features, at least batch] as a contiguous [batch, features]."""
    target = y.new_empty(batch, y.shape[0])
    transpose(y[:, :batch], target)
    return target


def transpose(source: Tensor, target: Tensor) -> None:
    """Writes the transpose of `source` into `target`, zeros where it has more columns."""
    (rows, columns), padded = source.shape, target.shape[1]
    if columns == 0 or padded == 0:
        return
    block = 64
    launch(
        transpose_kernel,
        (parts_of(padded, block), blocks_of(columns, block)),
        source,
        target,
        rows,
        columns,
        padded,
        *source.stride(),
        target.stride(0),
        BLOCK=block,
        num_warps=4,
    )
