"""Ways to make a `Pattern`."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from offpath.pattern.draw import distinct
from offpath.pattern.pattern import INT32_MAX, Pattern, PatternError


def from_csr(crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int]) -> Pattern:
    """The pattern of a CSR matrix of `shape`; index tensors of any integer width are copied to int32.

    Raises `PatternError` for unsorted, duplicate or out-of-range columns and for 2^31 or more connections.

    >>> import torch
    >>> csr = torch.eye(3).to_sparse_csr()
    >>> from_csr(csr.crow_indices(), csr.col_indices(), (3, 3))
    Pattern(3 x 3, nnz=3, sparsity=0.6667)
    """
    return Pattern(shape, _to_int32("crow_indices", crow_indices), _to_int32("col_indices", col_indices))


def from_mask(mask: Tensor) -> Pattern:
    """The pattern of the true entries of a 2-D boolean mask.

    Raises `PatternError` when `mask` is not 2-D boolean.

    >>> import torch
    >>> from_mask(torch.eye(4, dtype=torch.bool)).nnz
    4
    """
    _check_dense("mask", mask)
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise PatternError(f"expected a 2-D bool mask, got {mask.dtype} of shape {tuple(mask.shape)}")
    positions = mask.contiguous().view(-1).nonzero().squeeze(1)
    return from_positions(positions, (mask.shape[0], mask.shape[1]))


def from_dense(weight: Tensor) -> Pattern:
    """The pattern of the nonzeros of a 2-D matrix; NaN counts as a nonzero.

    Raises `PatternError` for another number of dimensions, and for what is no dense tensor.

    >>> import torch
    >>> from_dense(torch.tensor([[0.0, 2.0], [-1.0, 0.0]])).col_indices.tolist()
    [1, 0]
    """
    _check_dense("weight", weight)
    return from_mask(weight.detach() != 0)


def full(shape: tuple[int, int], device: torch.device | str | None = None) -> Pattern:
    """The pattern with every connection.

    >>> full((2, 3)).sparsity
    0.0
    """
    rows, columns = shape
    if rows * columns > INT32_MAX:
        raise PatternError(f"expected fewer than 2^31 connections, got {rows} x {columns}")
    crow_indices = torch.arange(rows + 1, dtype=torch.int32, device=device) * columns
    return Pattern(shape, crow_indices, torch.arange(columns, dtype=torch.int32, device=device).repeat(rows))


def random(
    shape: tuple[int, int],
    nnz: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Pattern:
    """A pattern of exactly `nnz` connections, every such pattern being equally likely.

    Takes O(nnz + rows) memory whatever the shape. Drawn on the CPU and then moved, so that a seed gives the same
    pattern on every device. Raises `PatternError` when `nnz` does not fit the shape.

    >>> random((65536, 65536), nnz=1000).nnz
    1000
    """
    positions = shape[0] * shape[1]
    if isinstance(nnz, bool) or not isinstance(nnz, Integral):
        raise PatternError(f"expected nnz to be a whole number, got {nnz!r}; round(density * rows * columns) is one")
    if not 0 <= nnz <= positions:
        raise PatternError(f"expected nnz in [0, {positions}] for shape {shape}, got {nnz}")
    if nnz > INT32_MAX:
        raise PatternError(f"expected fewer than 2^31 connections, got {nnz}; split the layer")
    if torch.device(device or "cpu").type == "meta":
        crow_indices = torch.empty(shape[0] + 1, dtype=torch.int32, device=device)
        return Pattern(shape, crow_indices, torch.empty(nnz, dtype=torch.int32, device=device))
    chosen = distinct(positions, nnz, generator)
    return from_positions(chosen, shape).to(device or "cpu")


def from_positions(positions: Tensor, shape: tuple[int, int]) -> Pattern:
    """The pattern of ascending, distinct row-major positions (int64) in a matrix of `shape`.

    Raises `PatternError` for anything else.
    """
    rows, columns = shape
    _check_dense("positions", positions)
    if positions.dtype != torch.int64 or positions.dim() != 1:
        raise PatternError(
            f"expected positions [nnz] in int64, got {positions.dtype} of shape {tuple(positions.shape)}"
        )
    if positions.numel() > INT32_MAX:
        raise PatternError(f"expected fewer than 2^31 connections, got {positions.numel()}; split the layer")
    if not bool((positions.diff() > 0).all()):
        raise PatternError("expected ascending positions, each one once, got others; sort them with unique()")
    outside = [place for place in positions[:: max(1, len(positions) - 1)].tolist() if not 0 <= place < rows * columns]
    if outside:  # the first or the last, as they ascend
        raise PatternError(f"expected positions in [0, {rows * columns}), got {outside[0]}")
    starts = torch.arange(rows + 1, dtype=torch.int64, device=positions.device) * columns
    crow_indices = torch.searchsorted(positions, starts, out_int32=True)
    return Pattern(shape, crow_indices, (positions % max(columns, 1)).int())


def _check_dense(name: str, given: object) -> None:
    """Raise `PatternError`, which leads on, for arrays of other libraries and for torch's sparse tensors."""
    if not isinstance(given, Tensor):
        raise PatternError(
            f"expected {name} to be a tensor, got a {type(given).__name__}; torch.from_numpy makes one of an array"
        )
    if given.layout is not torch.strided:
        raise PatternError(
            f"expected {name} to be dense, got layout {given.layout}; from_csr takes the crow_indices() and "
            "col_indices() of its to_sparse_csr()"
        )


def _to_int32(name: str, indices: Tensor) -> Tensor:
    _check_dense(name, indices)
    if indices.dtype == torch.int32:
        return indices.clone(memory_format=torch.contiguous_format)
    if indices.dtype not in (torch.int8, torch.int16, torch.uint8, torch.int64):
        raise PatternError(f"expected {name} to hold integers, got {indices.dtype}")
    if indices.numel() and int(indices.max()) > INT32_MAX:
        raise PatternError(f"expected {name} below 2^31, got {int(indices.max())}; split the layer")
    if indices.numel() and int(indices.min()) < 0:
        raise PatternError(f"expected {name} to be non-negative, got {int(indices.min())}")
    return indices.int().contiguous()
