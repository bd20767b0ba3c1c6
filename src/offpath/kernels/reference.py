"""The definition of every product in plain torch: any device, any floating dtype, differentiable by autograd.

Slow and memory-hungry (nnz x batch) on purpose: short enough to be read as the definition. Kernels answer to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from offpath.kernels import reference_convolution, reference_rows
from offpath.kernels.backend import Backend
from offpath.kernels.operands import row_numbers, wide


def spmm(crow_indices: Tensor, col_indices: Tensor, values: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[:, r] = bias[r] + sum over row r's slots s of values[s] * x[:, col_indices[s]].

    >>> import torch
    >>> crow_indices, col_indices = torch.tensor([0, 2, 3]), torch.tensor([0, 2, 1])
    >>> spmm(crow_indices, col_indices, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0, 10.0, 100.0]]))
    tensor([[201.,  30.]])
    """
    products = wide(values) * wide(x)[:, col_indices]
    y = products.new_zeros(x.shape[0], crow_indices.numel() - 1).index_add(1, row_numbers(crow_indices), products)
    return (y if bias is None else y + wide(bias)).to(values.dtype)


def sddmm(crow_indices: Tensor, col_indices: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    """dvalues[s] = <dy[:, r], x[:, col_indices[s]]> for the slots s of row r."""
    return (wide(dy)[:, row_numbers(crow_indices)] * wide(x)[:, col_indices]).sum(0).to(dy.dtype)


@dataclass(frozen=True)
class Plan:
    """Nothing but the arguments: the definition prepares nothing."""

    crow_indices: Tensor
    col_indices: Tensor
    columns: int
    dtype: torch.dtype | None = None
    permutation: Tensor | None = None
    bytes: int = 0


def planned_spmm(
    plan: Plan, values: Tensor, x: Tensor, bias: Tensor | None = None, feature_major: bool = False
) -> Tensor:
    """`spmm` over the arguments of the plan."""
    values = values if plan.permutation is None else values[plan.permutation]
    y = spmm(plan.crow_indices, plan.col_indices, values, x, bias)
    return y.t().contiguous().t() if feature_major else y


def tiled_sddmm(tiles: Plan, dy: Tensor, x: Tensor) -> Tensor:
    """`sddmm` over the arguments of the tiles."""
    return sddmm(tiles.crow_indices, tiles.col_indices, dy, x)


def bitmap_dx(bitmap: Plan, values: Tensor, dy: Tensor) -> Tensor:
    """dx[:, c] = sum over column c's slots s of values[s] * dy[:, row of s]."""
    products = wide(values) * wide(dy)[:, row_numbers(bitmap.crow_indices)]
    dx = products.new_zeros(dy.shape[0], bitmap.columns)
    return dx.index_add(1, bitmap.col_indices, products).to(values.dtype)


def backward(
    transpose: Plan | None,
    tiles: Plan | None,
    bitmap: Plan | None,
    values: Tensor,
    dy: Tensor,
    x: Tensor,
    feature_major: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a layer's input, values and bias."""
    dx = bitmap_dx(cast(Plan, bitmap), values, dy) if transpose is None else planned_spmm(transpose, values, dy)
    dx = dx.t().contiguous().t() if feature_major else dx
    return dx, tiled_sddmm(cast(Plan, tiles or bitmap), dy, x), wide(dy).sum(0).to(dy.dtype)


def bitmap_backward(
    bitmap: Plan, values: Tensor, dy: Tensor, x: Tensor, fills_dx: bool, fills_dvalues: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same over a bitmap alone; whether zeros are filled in makes no difference here."""
    return backward(None, None, bitmap, values, dy, x)


def int8_spmm(plan: Plan, values: Tensor, scales: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[:, r] = bias[r] + scales[r] * sum over row r's slots s of values[s] * x[:, col_indices[s]].

    `values` are int8, `scales` float32.
    """
    x_wide = wide(x)
    y = spmm(plan.crow_indices, plan.col_indices, values.to(x_wide.dtype), x_wide) * scales.to(x_wide.dtype)
    return (y if bias is None else y + wide(bias)).to(x.dtype)


def quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers in [-127, 127] as floats, sizes float32): x[b] is about sizes[b] * levels[b], in float32."""
    x = x.float()
    largest = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    lives = largest >= 2.0**-119  # below, the factor would overflow
    # Not 127 / largest, which torch computes as a reciprocal that it multiplies, rounding twice.
    factors = torch.full_like(largest, 127).div(largest)
    levels = (x * torch.where(lives, factors, 0).unsqueeze(1)).round()
    sizes = torch.where(lives, largest / 127, 0)
    return levels.nan_to_num(), sizes.where(largest.isfinite(), torch.nan)


def int8_dots(bitmap: Plan, values: Tensor, scales: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`int8_spmm` of x with every token rounded to int8 first; sums of products are whole numbers, without error."""
    levels, sizes = quantise_tokens(x)
    sums = spmm(bitmap.crow_indices, bitmap.col_indices, values.double(), levels.double())
    y = (sums * (sizes.double().unsqueeze(1) * scales.double())).to(wide(x).dtype)
    return (y if bias is None else y + wide(bias)).to(x.dtype)


def expand(bitmap: Plan, values: Tensor) -> Tensor:
    """dense[r, c] = the value of connection (r, c), or zero."""
    rows = row_numbers(bitmap.crow_indices)
    dense = values.new_zeros(bitmap.crow_indices.numel() - 1, bitmap.columns)
    return dense.index_put((rows, bitmap.col_indices.long()), values)


def compress(bitmap: Plan, dense: Tensor) -> Tensor:
    """values[s] = dense[row of s, column of s]."""
    return dense[row_numbers(bitmap.crow_indices), bitmap.col_indices.long()]


def _computes(device_type: str, dtype: torch.dtype) -> bool:
    return dtype.is_floating_point


BACKEND = Backend(
    name="reference",
    computes=_computes,
    spmm=spmm,
    sddmm=sddmm,
    plan=Plan,
    planned_spmm=planned_spmm,
    tiles=Plan,
    tiled_sddmm=tiled_sddmm,
    backward=backward,
    bitmap=Plan,
    bitmap_spmm=planned_spmm,
    bitmap_dx=bitmap_dx,
    bitmap_dvalues=tiled_sddmm,
    bitmap_backward=bitmap_backward,
    filled_spmm=planned_spmm,
    filled_dx=bitmap_dx,
    filled_dvalues=tiled_sddmm,
    bitmap_int8_spmm=int8_spmm,
    planned_int8_spmm=int8_spmm,
    filled_int8_spmm=int8_spmm,
    int8_dots=int8_dots,
    expand=expand,
    compress=compress,
    rows=reference_rows.ROWS,
    convolutions=reference_convolution.CONVOLUTIONS,
)
