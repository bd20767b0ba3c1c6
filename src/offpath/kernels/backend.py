"""What a backend is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from offpath.kernels.convolution import ConvolutionProducts
from offpath.kernels.errors import KernelError as KernelError
from offpath.kernels.row_products import RowProducts


class Spmm(Protocol):
    """y[:, r] = bias[r] + sum over row r's slots s of values[s] * x[:, col_indices[s]].

    `x` [batch, columns] with any strides, `y` [batch, rows], contiguous; where the backend is native, x may also be
    [..., columns] and y is [..., rows].
    """

    def __call__(
        self, crow_indices: Tensor, col_indices: Tensor, values: Tensor, x: Tensor, bias: Tensor | None = None
    ) -> Tensor: ...


class PreparedSpmm(Protocol):
    """The product of `Spmm` over a bitmap that the same backend made."""

    def __call__(self, prepared: Any, values: Tensor, x: Tensor, bias: Tensor | None = None, /) -> Tensor: ...


class MakePlan(Protocol):
    """What a backend wants to know of a canonical pattern that many products of `dtype` will use.

    With a `permutation`, slot s of this pattern has the value `values[permutation[s]]`: so the transpose of a
    pattern is planned over the values of the original. The plan has an attribute `bytes`.
    """

    def __call__(
        self,
        crow_indices: Tensor,
        col_indices: Tensor,
        columns: int,
        dtype: torch.dtype,
        permutation: Tensor | None = None,
    ) -> Any: ...


class MakePrepared(Protocol):
    """What a backend makes of a canonical pattern for one kind of product; the result has an attribute `bytes`."""

    def __call__(self, crow_indices: Tensor, col_indices: Tensor, columns: int) -> Any: ...


class PreparedSddmm(Protocol):
    """The product of `Sddmm` over tiles that the same backend made."""

    def __call__(self, tiles: Any, dy: Tensor, x: Tensor, /) -> Tensor: ...


class PlannedSpmm(Protocol):
    """The product of `Spmm` over a plan or a bitmap.

    With `feature_major`, y is a view of a contiguous [rows, batch].
    """

    def __call__(
        self, plan: Any, values: Tensor, x: Tensor, bias: Tensor | None = None, /, feature_major: bool = False
    ) -> Tensor: ...


class Int8Spmm(Protocol):
    """The product of `Spmm` over a plan or a bitmap with int8 `values` and a float32 scale for each row:

    y[:, r] = bias[r] + scales[r] * sum over row r's slots s of values[s] * x[:, col_indices[s]].
    """

    def __call__(
        self, prepared: Any, values: Tensor, scales: Tensor, x: Tensor, bias: Tensor | None = None, /
    ) -> Tensor: ...


class Backward(Protocol):
    """(dx, dvalues, dbias) of a layer at once; dbias is the sum of dy over the batch.

    dx goes over the plan of the transposed weight, dvalues over the tiles of the weight; where one of them is None,
    over the bitmap of the weight, absent connections filled with zeros. `dy` [batch, rows] and `x` [batch, columns]
    with any strides. With `feature_major`, dx is a view of a contiguous [columns, batch].
    """

    def __call__(
        self,
        transpose: Any | None,
        tiles: Any | None,
        bitmap: Any | None,
        values: Tensor,
        dy: Tensor,
        x: Tensor,
        /,
        feature_major: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class BitmapBackward(Protocol):
    """The same for a few tokens, over the bitmap of the weight, where not both of dx and dvalues fill in zeros."""

    def __call__(
        self, bitmap: Any, values: Tensor, dy: Tensor, x: Tensor, /, fills_dx: bool, fills_dvalues: bool
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class Sddmm(Protocol):
    """dvalues[s] = <dy[:, r], x[:, col_indices[s]]> for the slots s of row r.

    `dy` [batch, rows] and `x` [batch, columns] with any strides.
    """

    def __call__(self, crow_indices: Tensor, col_indices: Tensor, dy: Tensor, x: Tensor) -> Tensor: ...


class Costs(Protocol):
    """Seconds that a backend expects of its products."""

    def layer(
        self, product: str, method: str, rows: int, columns: int, nnz: int, batch: int, dtype: torch.dtype
    ) -> float:
        """Of a product of a layer with a weight [rows, columns], by one of the backend's methods."""
        ...

    def rows(
        self, product: str, nnz: int, rows: int, columns: int, width: int, dtype: torch.dtype
    ) -> tuple[float, float]:
        """Of a product of sparse rows with a matrix [columns, width]: as they are, and with their zeros written out."""
        ...


# Every way to compute a product of a layer; methods.py says what they are.
EVERY_METHOD = frozenset(("bucketed", "tiled", "row-wise", "bitmap", "filled", "dense"))


@dataclass(frozen=True)
class Backend:
    """One implementation of every product.

    `name` is what reports call it. `computes` says whether it has kernels for a device type and dtype, `methods` which
    of the ways to compute a product of a layer it has: the functions of the others refuse. The products expect a
    canonical pattern: whoever calls them has checked it. `digest` fingerprints the contents of (crow_indices,
    col_indices) at a small part of a product's cost; None where there is no such thing.
    `tiles` orders a pattern for its weight gradient, `bitmap` makes it one bit per position, `columns_of_bitmap` finds
    the column indices again that it was made of; None where a bitmap takes as much as these.
    The gradients go over the bitmap of the weight itself: `bitmap_dx` of values and dy, `bitmap_dvalues` of dy and x.
    `filled_spmm`, `filled_dx`, `filled_dvalues` and `filled_int8_spmm` compute the same with the absent connections as
    zeros: an infinite operand becomes NaN where it meets one.
    `int8_dots` computes the product of `Int8Spmm` over a bitmap with the tokens rounded to int8, each to a scale of its
    own (a 127th of its largest magnitude).
    `expand` writes the values of a bitmap's connections into a dense [rows, columns], zero elsewhere; `compress` picks
    them out of one. `rows` are the products on sparse activations, `convolutions` those on images: None where there are
    only torch's, with the weight written out. `lay_by_feature` gives an operand the layout in which several row-wise
    products can read it, so that not each of them turns it; None where they read any. What the methods of a `native`
    backend cost is measured on the machine, `costs` says it of another one; without either, products are computed row
    by row.
    """

    name: str
    computes: Callable[[str, torch.dtype], bool]
    spmm: Spmm
    sddmm: Sddmm
    plan: MakePlan
    planned_spmm: PlannedSpmm
    tiles: MakePrepared
    tiled_sddmm: PreparedSddmm
    backward: Backward
    bitmap: MakePrepared
    bitmap_spmm: PreparedSpmm
    bitmap_dx: Callable[[Any, Tensor, Tensor], Tensor]
    bitmap_dvalues: PreparedSddmm
    bitmap_backward: BitmapBackward
    filled_spmm: PlannedSpmm
    filled_dx: Callable[[Any, Tensor, Tensor], Tensor]
    filled_dvalues: PreparedSddmm
    bitmap_int8_spmm: Int8Spmm
    planned_int8_spmm: Int8Spmm
    filled_int8_spmm: Int8Spmm
    int8_dots: Int8Spmm
    expand: Callable[[Any, Tensor], Tensor]
    compress: Callable[[Any, Tensor], Tensor]
    rows: RowProducts
    convolutions: ConvolutionProducts | None
    digest: Callable[[Tensor, Tensor], int] | None = None
    native: bool = False
    methods: frozenset[str] = EVERY_METHOD
    costs: Costs | None = None
    lay_by_feature: Callable[[Tensor], Tensor] | None = None
    columns_of_bitmap: Callable[[Any], Tensor] | None = None
