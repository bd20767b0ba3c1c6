"""The frozen set of connections of one sparse matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1


class PatternError(ValueError):
    """A pattern is not canonical CSR, or an edit does not fit it."""


class Transpose(NamedTuple):
    """The same connections seen from the input side: CSR of the transposed matrix.

    `permutation[t]` is the slot, in the original pattern, of the transposed pattern's slot `t`; so the transposed
    matrix has the values `values[permutation]`.
    """

    crow_indices: Tensor
    col_indices: Tensor
    permutation: Tensor


@dataclass(frozen=True, eq=False)
class Pattern:
    """Which connections exist in an (out_features, in_features) matrix, in canonical CSR.

    `crow_indices` is int32 [out_features + 1], `col_indices` int32 [nnz], ascending and without duplicates inside
    each row. A connection's position in `col_indices` is its *slot*; values and optimizer state are stored in the
    order of the slots. A pattern never changes: an edit returns a new one, and the tensors belong to the pattern
    (whoever writes into them breaks it; `from_csr` copies).

    Raises `PatternError` when the arrays are not canonical.

    >>> import torch
    >>> pattern = Pattern((2, 3), torch.tensor([0, 2, 3]).int(), torch.tensor([0, 2, 1]).int())
    >>> pattern
    Pattern(2 x 3, nnz=3, sparsity=0.5)
    >>> pattern.to_mask().int().tolist()
    [[1, 0, 1], [0, 1, 0]]
    """

    shape: tuple[int, int]
    crow_indices: Tensor
    col_indices: Tensor

    def __post_init__(self) -> None:
        rows, columns = self.shape
        object.__setattr__(self, "shape", (int(rows), int(columns)))
        self.check()

    def check(self) -> None:
        """Raise `PatternError` naming the first thing that is not canonical CSR; O(nnz + rows)."""
        rows, columns = self.shape
        crow, col = self.crow_indices, self.col_indices
        if not (0 <= rows <= INT32_MAX and 0 <= columns <= INT32_MAX):
            raise PatternError(f"expected both sides of the shape in [0, 2^31), got {self.shape}")
        for name, tensor in (("crow_indices", crow), ("col_indices", col)):
            if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
                raise PatternError(
                    f"expected {name} to be a contiguous 1-D int32 tensor, got {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}; build the pattern with offpath.pattern.from_csr"
                )
        if crow.device != col.device:
            raise PatternError(f"expected both index tensors on one device, got {crow.device} and {col.device}")
        if crow.numel() != rows + 1:
            raise PatternError(f"expected crow_indices of {rows + 1} entries for {rows} rows, got {crow.numel()}")
        if crow.is_meta:
            return  # no data to look at; the arrays are checked when real ones take their place
        _check_contents(crow, col, columns)

    @property
    def nnz(self) -> int:
        """Number of connections."""
        return self.col_indices.numel()

    @property
    def density(self) -> float:
        """Share of the positions that are connections; 0 for a matrix without positions."""
        positions = self.shape[0] * self.shape[1]
        return self.nnz / positions if positions else 0.0

    @property
    def sparsity(self) -> float:
        """Share of the positions that are not connections: 1 - density."""
        return 1.0 - self.density

    @property
    def device(self) -> torch.device:
        """Where the index tensors are."""
        return self.col_indices.device

    @property
    def row_counts(self) -> Tensor:
        """Connections of each row (the live fan-in), int32 [out_features]."""
        return self.crow_indices.diff()

    @property
    def index_bytes(self) -> int:
        """Bytes of the index arrays, those of the transpose included once it has been asked for."""
        transpose = self.__dict__.get("_transposed", ())
        return sum(t.numel() * t.element_size() for t in (self.crow_indices, self.col_indices, *transpose))

    def row_indices(self) -> Tensor:
        """Row of each slot, int32 [nnz]."""
        rows = torch.arange(self.shape[0], dtype=torch.int32, device=self.device)
        return torch.repeat_interleave(rows, self.row_counts, output_size=self.nnz)

    def positions(self) -> Tensor:
        """Row-major position (row * in_features + column) of each slot, ascending, int64 [nnz]."""
        starts = torch.arange(self.shape[0], device=self.device) * self.shape[1]
        return torch.repeat_interleave(starts, self.row_counts, output_size=self.nnz).add_(self.col_indices)

    def transpose(self) -> Transpose:
        """The transposed pattern with its permutation; computed once and kept."""
        return self._transposed

    @cached_property
    def _transposed(self) -> Transpose:
        # A stable sort by column keeps the rows ascending, so the result is canonical again.
        col_indices, permutation = torch.sort(self.col_indices, stable=True)
        boundaries = torch.arange(self.shape[1] + 1, dtype=torch.int32, device=self.device)
        crow_indices = torch.searchsorted(col_indices, boundaries, out_int32=True)
        return Transpose(crow_indices, self.row_indices()[permutation], permutation.int())

    def to_mask(self) -> Tensor:
        """Boolean (out_features, in_features) mask; O(out_features * in_features) memory by its nature."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        mask[self.row_indices().long(), self.col_indices.long()] = True
        return mask

    def to_dense(self, values: Tensor) -> Tensor:
        """Dense (out_features, in_features) matrix with `values` [nnz] at the connections, zero elsewhere."""
        if values.shape != (self.nnz,):
            raise PatternError(f"expected values of shape ({self.nnz},), got {tuple(values.shape)}")
        dense = values.new_zeros(self.shape[0] * self.shape[1])
        return dense.index_put((self.positions(),), values).view(self.shape)

    def to(self, device: torch.device | str) -> Pattern:
        """The same pattern with its index tensors on `device`."""
        return Pattern(self.shape, self.crow_indices.to(device), self.col_indices.to(device))

    def equals(self, other: Pattern) -> bool:
        """Whether both hold the same connections in a matrix of the same shape."""
        return (
            self.shape == other.shape
            and torch.equal(self.crow_indices, other.crow_indices)
            and torch.equal(self.col_indices, other.col_indices)
        )

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"Pattern({rows} x {columns}, nnz={self.nnz}, sparsity={self.sparsity:.4g})"

    def __reduce__(self) -> tuple:
        # Without the transpose: the reader can make it again, and checks what it reads.
        return Pattern, (self.shape, self.crow_indices, self.col_indices)


def _check_contents(crow: Tensor, col: Tensor, columns: int) -> None:
    nnz = col.numel()
    if nnz > INT32_MAX:
        raise PatternError(f"expected fewer than 2^31 connections, got {nnz}; split the layer")
    if int(crow[0]) != 0 or int(crow[-1]) != nnz:
        raise PatternError(
            f"expected crow_indices to run from 0 to the number of columns given ({nnz}), "
            f"got {int(crow[0])} to {int(crow[-1])}"
        )
    falls = crow[1:] < crow[:-1]
    if bool(falls.any()):
        raise PatternError(f"expected crow_indices to never fall, but it does at row {int(falls.nonzero()[0])}")
    if nnz == 0:
        return
    low, high = (int(v) for v in torch.aminmax(col))
    if low < 0 or high >= columns:
        raise PatternError(f"expected columns in [0, {columns}), got {low if low < 0 else high}")
    not_ascending = col[1:] <= col[:-1]
    starts = crow[1:-1].long()
    starts = starts[(starts > 0) & (starts < nnz)]
    not_ascending[starts - 1] = False  # the step from one row to the next may go down
    if bool(not_ascending.any()):
        slot = int(not_ascending.nonzero()[0])
        row = int(torch.searchsorted(crow, torch.tensor(slot, dtype=crow.dtype, device=crow.device), right=True)) - 1
        kind = "a duplicate column" if int(col[slot]) == int(col[slot + 1]) else "unsorted columns"
        raise PatternError(
            f"expected ascending columns without duplicates in each row, got {kind} in row {row} "
            f"({int(col[slot])} then {int(col[slot + 1])}); sort and merge them first, or build the pattern from a mask"
        )


def expect(given: object, shape: tuple[int, ...], sides: str = "") -> None:
    """Raise `PatternError` unless `given` is a pattern of `shape`, whose `sides` the message names."""
    if not isinstance(given, Pattern):
        raise PatternError(
            f"expected an offpath.Pattern, got a {type(given).__name__}; offpath.pattern.from_mask makes one of a bool "
            "tensor, from_csr of the two index tensors of CSR"
        )
    if given.shape != shape:
        raise PatternError(f"expected a pattern of shape {sides}{shape}, got {given.shape}")
