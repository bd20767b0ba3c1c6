"""Which connections a layer has, as few bytes: one bit for every position, or the columns of each row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from offpath.pattern import Pattern, PatternError
from offpath.storage.errors import StorageError

# Encoding: the names of its tensors, which stand beside the layer's own. "none" is that of a layer without connections.
ENCODINGS = {"bitmap": ("bitmap",), "columns": ("col_indices", "row_counts"), "none": ()}
# A row of 65535 columns is the widest whose columns and whose count fit 16 bits.
UINT16_MAX = 2**16 - 1
# Bits are packed and unpacked a piece at a time, so that memory stays in proportion to the file.
_CHUNK_BYTES = 2**20


def bitmap_bytes(shape: tuple[int, int]) -> int:
    """Bytes of one bit for every position, the last byte filled up.

    >>> bitmap_bytes((3, 5))
    2
    """
    return -(-shape[0] * shape[1] // 8)


def columns_bytes(shape: tuple[int, int], nnz: int) -> int:
    """Bytes of a column for every connection and a count for every row."""
    return _index_type(shape[1]).itemsize * (nnz + shape[0])


def encode(pattern: Pattern) -> tuple[str, dict[str, Tensor]]:
    """The smaller encoding of `pattern` and its tensors, on the CPU; the bitmap is never chosen for an empty matrix.

    >>> from offpath import pattern as patterns
    >>> encode(patterns.full((2, 3)))
    ('bitmap', {'bitmap': tensor([63], dtype=torch.uint8)})
    >>> encode(patterns.random((2, 300), nnz=0))[1]["row_counts"]
    tensor([0, 0], dtype=torch.uint16)
    """
    pattern = pattern.to("cpu")
    if 0 < bitmap_bytes(pattern.shape) < columns_bytes(pattern.shape, pattern.nnz):
        return "bitmap", {"bitmap": _to_bitmap(pattern)}
    dtype = _index_type(pattern.shape[1])
    return "columns", {"col_indices": pattern.col_indices.to(dtype), "row_counts": pattern.row_counts.to(dtype)}


def decode(encoding: str, tensors: dict[str, Tensor], shape: tuple[int, int], nnz: int) -> Pattern:
    """The pattern of `shape` with `nnz` connections that `encode` made `tensors` of.

    Takes memory in proportion to the tensors, whatever they hold and the shape says. Raises `StorageError` for tensors
    that are not what `encode` makes.
    """
    if encoding == "bitmap":
        return _from_bitmap(tensors["bitmap"], shape, nnz)
    col_indices, row_counts = tensors["col_indices"], tensors["row_counts"]
    dtype = _index_type(shape[1])
    for name, tensor, size in (("col_indices", col_indices, nnz), ("row_counts", row_counts, shape[0])):
        _expect(name, tensor, dtype, size)
    counts = row_counts.numpy().astype(np.int64)
    if counts.sum() != nnz or (counts.size and counts.min() < 0):
        raise StorageError(f"expected row_counts that add up to {nnz} connections, got {counts.sum()}")
    crow_indices = torch.zeros(shape[0] + 1, dtype=torch.int32, device="cpu")
    crow_indices[1:] = torch.from_numpy(counts.cumsum())
    # A copy even of int32 columns: the file's memory is not the layer's.
    return _checked(shape, crow_indices, col_indices.to(torch.int32, copy=True))


def _index_type(columns: int) -> torch.dtype:
    return torch.uint16 if columns <= UINT16_MAX else torch.int32


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, size: int) -> None:
    if tensor.dtype != dtype or tensor.shape != (size,):
        raise StorageError(f"expected {name} to be {dtype} [{size}], got {tensor.dtype} {list(tensor.shape)}")


def _checked(shape: tuple[int, int], crow_indices: Tensor, col_indices: Tensor) -> Pattern:
    try:
        return Pattern(shape, crow_indices, col_indices)
    except PatternError as error:
        raise StorageError(str(error)) from error


def _to_bitmap(pattern: Pattern) -> Tensor:
    positions = pattern.positions().numpy()
    size = bitmap_bytes(pattern.shape)
    bitmap = np.empty(size, np.uint8)
    for start in range(0, size, _CHUNK_BYTES):
        piece = bitmap[start : start + _CHUNK_BYTES]
        low, high = np.searchsorted(positions, (8 * start, 8 * (start + piece.size)))
        bits = np.zeros(8 * piece.size, np.bool_)
        bits[positions[low:high] - 8 * start] = True
        piece[:] = np.packbits(bits, bitorder="little")
    return torch.from_numpy(bitmap)


def _from_bitmap(bitmap: Tensor, shape: tuple[int, int], nnz: int) -> Pattern:
    rows, columns = shape
    _expect("bitmap", bitmap, torch.uint8, bitmap_bytes(shape))
    if not bitmap.numel() or nnz > 8 * bitmap.numel():
        raise StorageError(f"expected a bitmap of {nnz} connections, got one of {8 * bitmap.numel()} positions")
    counts = np.zeros(rows, np.int64)
    col_indices = np.empty(nnz, np.int32)
    found = 0
    for start in range(0, bitmap.numel(), _CHUNK_BYTES):
        positions = np.flatnonzero(np.unpackbits(bitmap[start : start + _CHUNK_BYTES].numpy(), bitorder="little"))
        if not positions.size:
            continue
        row_indices, chunk_columns = np.divmod(positions + 8 * start, columns)
        if row_indices[-1] >= rows or found + positions.size > nnz:
            break
        col_indices[found : found + positions.size] = chunk_columns
        first = row_indices[0]
        within = np.bincount(row_indices - first)
        counts[first : first + within.size] += within
        found += positions.size
    else:
        if found == nnz:
            crow_indices = torch.zeros(rows + 1, dtype=torch.int32, device="cpu")
            crow_indices[1:] = torch.from_numpy(counts.cumsum())
            return _checked(shape, crow_indices, torch.from_numpy(col_indices))
    raise StorageError(f"expected a bitmap of {nnz} connections and no bits behind its end, got others")
