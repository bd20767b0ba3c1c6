"""`SparseRows`: a batch of activations of which each sample has a few."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from offpath import kernels
from offpath.kernels import KernelError
from offpath.kernels.operands import row_numbers
from offpath.kernels.reference_rows import check_pointer, check_rows
from offpath.ops.int32 import expect_columns, expect_entries, of_int32
from offpath.ops.library import direct
from offpath.ops.row_products import check_parts
from offpath.ops.row_slices import RowChoice, entries_of
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
            or not (
                (crow_indices.is_cpu and indices.is_cpu and values.is_cpu)  # soon known: layers make rows in every call
                or crow_indices.device == indices.device == values.device
            )
        ):
            raise KernelError(
                "expected crow_indices int32 [rows + 1], indices int32 [nnz] and floating values [nnz] on one device; "
                "got " + ", ".join(f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (crow_indices, indices, values))
            )
        self.crow_indices, self.indices, self.values = crow_indices, indices, values
        self.columns: int = columns if type(columns) is int and 0 <= columns < 2**31 else expect_columns(columns)

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
        return cls(crow_indices, of_int32(indices.reshape(-1), columns), values.reshape(-1), columns)

    @classmethod
    def from_sparse_csr(cls, matrix: Tensor) -> SparseRows:
        """The entries of a matrix of torch's CSR layout; differentiable.

        >>> SparseRows.from_sparse_csr(torch.eye(2).to_sparse_csr())
        SparseRows(shape=(2, 2), nnz=2, float32, 1 in a row)
        """
        if not isinstance(matrix, Tensor) or matrix.layout is not torch.sparse_csr or matrix.dim() != 2:
            got = f"{matrix.layout} {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
            raise KernelError(
                f"expected a matrix of layout torch.sparse_csr, got {got}; matrix.to_sparse_csr() makes one of a tensor"
            )
        indices, columns = matrix.col_indices(), matrix.shape[1]
        crow_indices = matrix.crow_indices().clamp(-1, expect_entries(indices.shape[0]) + 1)
        return cls(crow_indices.int(), of_int32(indices, columns), matrix.values(), columns)

    @classmethod
    def cat(cls, parts: Sequence[SparseRows]) -> SparseRows:
        """All rows of `parts`, one after the other; differentiable. Raises `KernelError` for parts that do not fit.

        >>> rows = SparseRows.from_dense(torch.eye(2))
        >>> SparseRows.cat([rows, rows[1:]]).indices
        tensor([0, 1, 1], dtype=torch.int32)
        """
        parts = list(parts)
        if not all(isinstance(part, SparseRows) for part in parts):
            raise KernelError(f"expected SparseRows, got {', '.join(type(part).__name__ for part in parts)}")
        kinds = {(part.columns, part.dtype, part.device) for part in parts}
        if len(kinds) != 1:
            got = "; ".join(f"{columns} columns of {dtype} on {device}" for columns, dtype, device in kinds)
            raise KernelError(f"expected rows of one width, dtype and device, got {got or 'none'}")
        expect_entries(sum(part.nnz for part in parts))
        for part in parts:
            check_pointer(part.crow_indices, part.nnz)
        counts = torch.cat([part.crow_indices.diff() for part in parts])
        indices, values = (torch.cat([getattr(part, name) for part in parts]) for name in ("indices", "values"))
        return cls(torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(), indices, values, parts[0].columns)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: RowChoice) -> SparseRows:
        """Some of the rows: a slice, row numbers [n] in any order, or a mask [rows]; differentiable.

        As of a tensor, a slice of step 1 shares memory, and others are copies. Raises `KernelError` for other choices.

        >>> SparseRows.from_dense(torch.eye(3))[[2, 0]].indices
        tensor([2, 0], dtype=torch.int32)
        """
        crow_indices, entries = entries_of(self.crow_indices, self.nnz, rows)
        return SparseRows(crow_indices, self.indices[entries], self.values[entries], self.columns)

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

    def to_sparse_csr(self) -> Tensor:
        """The same as a tensor of torch's CSR layout, which shares memory; differentiable by autograd.

        Raises `KernelError` where the indices of a row do not ascend, which that layout does not know.

        >>> SparseRows.from_dense(torch.eye(2)).to_sparse_csr().values()
        tensor([1., 1.])
        """
        self._check()
        rows = row_numbers(self.crow_indices, self.nnz)
        if not bool(((self.indices[1:] > self.indices[:-1]) | (rows[1:] > rows[:-1])).all()):
            raise KernelError("expected indices that ascend in each row, got others; from_dense(rows.to_dense()) sorts")
        return torch.sparse_csr_tensor(self.crow_indices, self.indices, self.values, self.shape, check_invariants=False)

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

    def to(self, *target: Any, **options: Any) -> SparseRows:
        """As `Tensor.to`: the values in another dtype, all parts on another device.

        >>> SparseRows.from_dense(torch.eye(2)).to(device="meta", dtype=torch.float64)
        SparseRows(shape=(2, 2), nnz=2, float64, on meta)
        """
        values = self.values.to(*target, **options)
        if values is self.values:
            return self
        how = {name: options[name] for name in ("non_blocking", "copy") if name in options}
        crow_indices, indices = (part.to(values.device, **how) for part in (self.crow_indices, self.indices))
        return SparseRows(crow_indices, indices, values, self.columns)

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
        if not torch.compiler.is_compiling():  # which cannot look at numbers
            check_pointer(self.crow_indices, self.nnz)
        return row_numbers(self.crow_indices, self.nnz).int()

    def live_counts(self) -> Tensor:
        """In how many entries each column has a value other than zero, int64 [columns]."""
        self._check()
        live = (self.values != 0).long()
        return live.new_zeros(self.columns).index_add(0, self.indices.long(), live)

    def __setstate__(self, state: Any) -> None:
        """What a file holds is no better than what a caller gives."""
        parts = ("crow_indices", "indices", "values", "columns")
        others = {name: state[name] for name in state if name not in parts} if isinstance(state, dict) else state
        if len(state) - len(others) < len(parts) or any(hasattr(SparseRows, name) for name in others):
            raise KernelError(f"expected the parts of SparseRows, got {', '.join(map(str, state))}")
        SparseRows.__init__(self, *(state[part] for part in parts))
        self.__dict__ |= others

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"expected a tensor, which has {name}, got SparseRows; SparseInputLinear and SparseSparseLinear multiply "
            "them, for other layers rows.to_dense() is a tensor"
        )

    def _check(self) -> None:
        check_parts(self.crow_indices, self.indices, self.values)
        check_rows(self.crow_indices, self.indices, self.columns)

    def __repr__(self) -> str:
        per_row = self.crow_indices.diff()
        dtype, stored = str(self.dtype).removeprefix("torch."), "on meta"
        if not per_row.is_meta:
            least, most = (int(per_row.min()), int(per_row.max())) if per_row.numel() else (0, 0)
            stored = f"{least} to {most} in a row" if least != most else f"{most} in a row"
        return f"SparseRows(shape={self.shape}, nnz={self.nnz}, {dtype}, {stored})"


# `torch.load` may read what `torch.save` wrote, under this name of the module: files would not survive another one.
torch.serialization.add_safe_globals([SparseRows])
