"""`SparseRows`: a batch of activations of which each sample has a few, and how one is made of dense scores."""

from __future__ import annotations

import torch
from torch import Tensor

from offpath import kernels
from offpath.kernels import KernelError
from offpath.kernels.reference_rows import check_rows
from offpath.ops.library import direct
from offpath.ops.selection import check_scores, row_pointer, to_dense


class SparseRows:
    """Rows of (indices, values): a matrix of shape (rows, columns) that stores the live entries of each row.

    `values` [nnz] of a floating dtype, differentiable; `indices` int32 [nnz]; row b has the entries
    `crow_indices[b]` to `crow_indices[b + 1]` (int32 [rows + 1]). Selections write the indices of a row in ascending
    order; products accept any order, and an index that occurs twice in a row counts twice. Raises `KernelError` for
    parts that do not fit together; indices out of range are refused by the products.

    >>> import torch
    >>> rows = SparseRows.from_dense(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]]))
    >>> rows
    SparseRows(shape=(2, 3), nnz=3, float32, 1 to 2 in a row)
    >>> rows @ torch.tensor([[1.0], [10.0], [100.0]])
    tensor([[ 20.],
            [301.]])
    """

    # Not a frozen dataclass: torch.compile cannot rebuild one that holds what it traces.
    def __init__(self, crow_indices: Tensor, indices: Tensor, values: Tensor, columns: int) -> None:
        if (
            crow_indices.dim() != 1
            or crow_indices.shape[0] == 0
            or indices.dim() != 1
            or values.shape != indices.shape
            or crow_indices.dtype is not torch.int32
            or indices.dtype is not torch.int32
            or not values.dtype.is_floating_point
        ):
            raise KernelError(
                "expected crow_indices int32 [rows + 1], indices int32 [nnz] and floating values [nnz]; got "
                + ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in (crow_indices, indices, values))
            )
        self.crow_indices, self.indices, self.values, self.columns = crow_indices, indices, values, columns

    @classmethod
    def from_dense(cls, dense: Tensor) -> SparseRows:
        """The nonzeros (and NaN) of `dense` [rows, columns], differentiable.

        >>> SparseRows.from_dense(torch.eye(3)).indices
        tensor([0, 1, 2], dtype=torch.int32)
        """
        check_scores(dense)
        crow_indices, indices, values = direct.above(dense, None)
        return cls(crow_indices, indices, values, dense.shape[1])

    @classmethod
    def from_topk(cls, values: Tensor, indices: Tensor, columns: int) -> SparseRows:
        """Rows of k entries each: `values` and `indices` (any integer dtype) [rows, k].

        >>> top = torch.tensor([[3.0, 1.0, 2.0]]).topk(2)
        >>> SparseRows.from_topk(top.values, top.indices, 3).to_dense()
        tensor([[3., 0., 2.]])
        """
        if values.dim() != 2 or values.shape != indices.shape:
            raise KernelError(
                f"expected values and indices [rows, k], got {tuple(values.shape)} and {tuple(indices.shape)}"
            )
        if indices.is_floating_point() or indices.is_complex() or indices.dtype is torch.bool:
            raise KernelError(f"expected integer indices, got {indices.dtype}; give what topk returns as its indices")
        # Before the indices are copied: those of too many entries take 16 GB.
        crow_indices = row_pointer(values.shape[0], values.shape[1], values.device)
        if indices.dtype is torch.int64:  # what no int32 can hold must not become another index
            indices = indices.clamp(-1, columns)
        return cls(crow_indices, indices.reshape(-1).int(), values.reshape(-1), columns)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.crow_indices.shape[0] - 1, self.columns

    @property
    def nnz(self) -> int:
        """Number of entries."""
        return self.indices.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Device of all parts."""
        return self.values.device

    @property
    def density(self) -> float:
        """Share of the matrix that is stored, zeros among it: `live_counts` leaves these out."""
        positions = self.shape[0] * self.columns
        return self.nnz / positions if positions else 0.0

    def to_dense(self) -> Tensor:
        """[rows, columns] with the zeros written out; differentiable."""
        self._check()
        return to_dense(self.crow_indices, self.indices, self.values, self.columns)

    def with_values(self, values: Tensor) -> SparseRows:
        """The same places with other values [nnz].

        >>> rows = SparseRows.from_dense(torch.tensor([[0.0, -2.0]]))
        >>> rows.with_values(rows.values.relu()).to_dense()
        tensor([[0., 0.]])
        """
        return SparseRows(self.crow_indices, self.indices, values, self.columns)

    def relu(self) -> SparseRows:
        """max(value, 0) at the same places; an entry that is not positive passes no gradient."""
        return self.with_values(self.values.relu())

    def detach(self) -> SparseRows:
        """The same numbers without their history."""
        return self.with_values(self.values.detach())

    def to(self, target: torch.dtype | torch.device | str) -> SparseRows:
        """The values in another dtype, or all parts on another device.

        >>> SparseRows.from_dense(torch.eye(2)).to("meta").indices.device
        device(type='meta')
        """
        values = self.values.to(target)
        if isinstance(target, torch.dtype):
            return self.with_values(values)
        return SparseRows(self.crow_indices.to(target), self.indices.to(target), values, self.columns)

    def matmul(self, weight: Tensor) -> Tensor:
        """self @ weight for a dense `weight` [columns, width] of the same dtype: [rows, width].

        Differentiable in the values and the weight, as often as one likes. Only the rows of `weight` that an index
        names are read.
        """
        if weight.shape[:1] != (self.columns,):
            raise KernelError(f"expected a weight of {self.columns} rows, got shape {tuple(weight.shape)}")
        return direct.rows_matmul(self.values, self.crow_indices, self.indices, weight)

    def __matmul__(self, weight: Tensor) -> Tensor:
        return self.matmul(weight)

    def add_weight_gradient(self, dy: Tensor, buffer: Tensor) -> None:
        """buffer += self.T @ dy for `dy` [rows, width] and `buffer` [columns, width].

        Rows of the buffer that no entry names are not touched: so the gradient of a large weight accumulates without a
        second matrix of its size.

        >>> rows, gradient = SparseRows.from_dense(torch.tensor([[0.0, 2.0]])), torch.ones(2, 1)
        >>> rows.add_weight_gradient(torch.tensor([[5.0]]), gradient)
        >>> gradient
        tensor([[ 1.],
                [11.]])
        """
        if buffer.shape[:1] != (self.columns,):
            raise KernelError(f"expected a buffer of {self.columns} rows, got shape {tuple(buffer.shape)}")
        with torch.no_grad():  # as a decorator it would keep `torch.compile` out
            torch.ops.offpath.add_rows_weight_gradient(buffer, self.values, self.crow_indices, self.indices, dy)

    def counts(self) -> Tensor:
        """In how many entries each column occurs, int32 [columns].

        >>> SparseRows.from_dense(torch.tensor([[0.0, 2.0], [1.0, 3.0]])).counts()
        tensor([1, 2], dtype=torch.int32)
        """
        return kernels.select(self.device.type, self.dtype).rows.counts(self.indices, self.columns)

    def row_indices(self) -> Tensor:
        """The row of each entry, int32 [nnz].

        >>> SparseRows.from_dense(torch.tensor([[0.0, 2.0], [1.0, 3.0]])).row_indices()
        tensor([0, 1, 1], dtype=torch.int32)
        """
        numbers = torch.arange(self.shape[0], dtype=torch.int32, device=self.device)
        return numbers.repeat_interleave(self.crow_indices.diff(), output_size=self.nnz)

    def live_counts(self) -> Tensor:
        """In how many entries each column has a value other than zero, int64 [columns]."""
        self._check()
        live = (self.values != 0).long()
        return live.new_zeros(self.columns).index_add(0, self.indices.long(), live)

    def _check(self) -> None:
        check_rows(self.crow_indices, self.indices, self.columns)

    def __repr__(self) -> str:
        per_row = self.crow_indices.diff() if not self.crow_indices.is_meta else self.crow_indices[:0]
        least, most = (int(per_row.min()), int(per_row.max())) if per_row.numel() else (0, 0)
        stored = f"{least} to {most}" if least != most else str(most)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"SparseRows(shape={self.shape}, nnz={self.nnz}, {dtype}, {stored} in a row)"


def topk_rows(x: Tensor, k: int) -> SparseRows:
    """The k largest entries of each row of `x` [rows, columns].

    Of equal entries those with the lowest index; NaN counts as the largest. The gradient goes to the chosen entries.
    Raises `KernelError` for k outside [0, columns].

    >>> topk_rows(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), 2).indices
    tensor([1, 3], dtype=torch.int32)
    """
    check_scores(x)
    values, indices = direct.topk_rows(x, k)
    return SparseRows.from_topk(values, indices, x.shape[1])


def batch_topk(x: Tensor, k: int) -> SparseRows:
    """The k largest entries of all of `x` [rows, columns]: rows differ in how many they have (Bussmann et al., 2024).

    >>> batch_topk(torch.tensor([[1.0, 3.0], [4.0, 0.0]]), 2).crow_indices
    tensor([0, 1, 2], dtype=torch.int32)
    """
    check_scores(x)
    crow_indices, indices, values = direct.batch_topk(x, k)
    return SparseRows(crow_indices, indices, values, x.shape[1])


def above(x: Tensor, threshold: Tensor | float = 0.0) -> SparseRows:
    """The entries of `x` [rows, columns] that are larger than a threshold, a number or one for each column (or NaN).

    With 0 these are the ones that ReLU lets through. The threshold gets no gradient. A number, or a
    tensor of a wider dtype than that of `x`, is rounded down to it, which lets the same entries through.

    >>> above(torch.tensor([[1.0, -3.0], [4.0, 0.0]])).values
    tensor([1., 4.])
    """
    check_scores(x)
    if not isinstance(threshold, Tensor):
        threshold = torch.tensor(threshold, dtype=torch.float64, device=x.device)
    elif threshold.shape not in ((), (1,), (x.shape[1],)):
        raise KernelError(
            f"expected one threshold, or one for each of the {x.shape[1]} columns, got shape {tuple(threshold.shape)}"
        )
    threshold = _round_down(threshold.detach(), x.dtype)
    crow_indices, indices, values = direct.above(x, threshold.expand(x.shape[1]).contiguous())
    return SparseRows(crow_indices, indices, values, x.shape[1])


def encode_topk(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> SparseRows:
    """`topk_rows(x @ weight.T + bias, k)` without storing the product.

    `x` [rows, width], `weight` [latents, width], `bias` [latents] or None, of one dtype. The
    gradients touch only what was chosen: no [rows, latents] and no [rows, k, width] is ever made.

    >>> encode_topk(torch.tensor([[1.0]]), torch.tensor([[1.0], [3.0]]), None, 1).values
    tensor([3.])
    """
    values, indices = direct.encode_topk(x, weight, bias, k)
    return SparseRows.from_topk(values, indices, weight.shape[0])


def _round_down(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number of `dtype` that is not above `threshold`: the same entries of that dtype exceed both."""
    nearest = threshold.to(dtype)
    if torch.promote_types(dtype, threshold.dtype) is dtype:
        return nearest
    below = torch.nextafter(nearest, torch.full_like(nearest, -torch.inf))
    return torch.where(nearest > threshold, below, nearest)
