"""What the native products expect of sparse rows, and of matrices that they read row by row."""

from __future__ import annotations

from torch import Tensor

from offpath.kernels import _native
from offpath.kernels.operands import address, are_indices, refuse
from offpath.kernels.reference_rows import check_rows


def check_rows_fit(crow_indices: Tensor, indices: Tensor, columns: int) -> None:
    """Raises `KernelError` for rows that no kernel may follow."""
    if not are_indices(crow_indices, indices):
        refuse(crow_indices=crow_indices, indices=indices)
    rows, nnz = crow_indices.shape[0] - 1, indices.shape[0]
    if not _native.rows_fit(rows, nnz, columns, address(crow_indices), address(indices)):
        check_rows(crow_indices, indices, columns)  # says what is wrong


def has_rows(matrix: Tensor) -> bool:
    """Whether the rows are contiguous, and do not overlap."""
    return matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]


def contiguous_rows(matrix: Tensor) -> Tensor:
    return matrix if has_rows(matrix) else matrix.contiguous()
