"""A sparse weight for products with many tokens: its connections by blocks of rows and by columns that go together.

256 rows are a block, those of similar length in one, dealt to its warps in turn. Their connections to a chunk of
columns are a bucket: row by row, in pairs, each connection 8 bytes as shared memory has them when a block multiplies:
where the column lies, and the value. A row with an odd number of them in a bucket has a filler, of a column that is
zero. Chunks are as wide as shared memory has room for, twice: one is multiplied while the next one arrives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from offpath.kernels.errors import KernelError
from offpath.kernels.gpu.n4 import inverse, offsets
from offpath.kernels.operands import row_numbers

ROWS, WARPS = 256, 16  # of a block
TOKENS = 128  # of a block
DTYPES = (torch.float32, torch.bfloat16)
MAX_PAIRS = 2**31 - 1
_LEAST_COLUMNS = 8
_PAIR_BYTES = 16


@dataclass(frozen=True, eq=False)
class Buckets:
    """A sparse pattern of `shape` (rows, columns), for activations of `dtype`.

    `row_order` int32 [blocks * 256]: the row of each place in a block, or -1. `pair_offsets` int32 [blocks * chunks *
    256 + 1]: where each row's pairs in a bucket begin. `entries` int32 [pairs * 2, 2]: the byte in shared memory where
    the column of each connection begins, and room for its value. `places` [nnz]: the entry of each value.
    `most_pairs`: of a bucket.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    chunk_columns: int
    most_pairs: int
    row_order: Tensor
    pair_offsets: Tensor
    entries: Tensor
    places: Tensor

    @property
    def bytes(self) -> int:
        """Bytes of the tensors."""
        tensors = self.row_order, self.pair_offsets, self.entries, self.places
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def shared_bytes(self) -> int:
        """What a block needs."""
        return shared_bytes_of(self.chunk_columns, self.most_pairs, self.dtype)

    def with_values(self, values: Tensor) -> Tensor:
        """The entries with their values in place, as float32; fillers have zeros."""
        entries = self.entries.clone()
        entries[:, 1].index_copy_(0, self.places, values.float().view(torch.int32))
        return entries


def expect_narrow(dtype: torch.dtype) -> None:
    """Raises `KernelError` for a dtype without products over plans."""
    if dtype not in DTYPES:
        raise KernelError(f"expected float32 or bfloat16, got {dtype}. Cast the module, or force another method")


def shared_bytes_of(chunk_columns: int, most_pairs: int, dtype: torch.dtype) -> int:
    """Two buffers of a chunk of x, with a column of zeros, and of a bucket."""
    return 2 * ((chunk_columns + 1) * TOKENS * dtype.itemsize + most_pairs * _PAIR_BYTES)


def make_buckets(
    crow_indices: Tensor,
    col_indices: Tensor,
    columns: int,
    dtype: torch.dtype,
    permutation: Tensor | None,
    shared_bytes: int,
) -> Buckets:
    """The buckets of a canonical pattern, for blocks with so many bytes of shared memory.

    `crow_indices`, `col_indices` int32; with a `permutation` [nnz], slot s has the value `values[permutation[s]]`.
    Raises `KernelError` for a dtype other than float32 and bfloat16.
    """
    expect_narrow(dtype)
    counts = crow_indices.long().diff()
    blocks = -(-counts.numel() // ROWS)
    order = counts.argsort(descending=True, stable=True)
    dealt = torch.arange(counts.numel(), device=counts.device)
    dealt = dealt // ROWS * ROWS + dealt % WARPS * (ROWS // WARPS) + dealt % ROWS // WARPS
    row_order = torch.full((blocks * ROWS,), -1, dtype=torch.int32, device=counts.device)
    row_order[dealt] = order.int()
    places_of_rows = torch.empty_like(dealt)
    places_of_rows[order] = dealt
    places = places_of_rows[row_numbers(crow_indices, col_indices.shape[0]).long()]
    for chunk_columns in _widths(columns, dtype, shared_bytes):
        chunks = -(-columns // chunk_columns)
        runs = (places // ROWS * chunks + col_indices // chunk_columns) * ROWS + places % ROWS
        run_counts = torch.bincount(runs, minlength=blocks * chunks * ROWS)
        pairs = (run_counts + 1) // 2
        most_pairs = int(pairs.view(-1, ROWS).sum(1).max()) if pairs.numel() else 0
        if shared_bytes_of(chunk_columns, most_pairs, dtype) <= shared_bytes:
            break
    else:
        raise KernelError(f"expected a GPU whose blocks have more than {shared_bytes:,} bytes of shared memory")
    pair_offsets = offsets(pairs)
    n_pairs = int(pair_offsets[-1])
    if n_pairs > MAX_PAIRS:
        raise KernelError(f"expected at most {MAX_PAIRS:,} pairs of connections, got {n_pairs:,}. Split it by rows")
    in_order = runs.argsort(stable=True)
    sorted_runs = runs[in_order]
    nth = torch.arange(runs.numel(), device=runs.device) - offsets(run_counts)[sorted_runs]
    entry_places = 2 * pair_offsets[sorted_runs] + nth
    row_bytes = TOKENS * dtype.itemsize
    entries = torch.zeros(2 * n_pairs, 2, dtype=torch.int32, device=runs.device)
    entries[:, 0] = chunk_columns * row_bytes
    entries[entry_places, 0] = (col_indices[in_order] % chunk_columns) * row_bytes
    places_of_slots = entry_places[inverse(in_order)]
    if permutation is not None:
        places_of_slots = torch.empty_like(places_of_slots).index_copy_(0, permutation.long(), places_of_slots)
    shape = counts.numel(), columns
    return Buckets(shape, dtype, chunk_columns, most_pairs, row_order, pair_offsets.int(), entries, places_of_slots)


def _widths(columns: int, dtype: torch.dtype, shared_bytes: int) -> Iterator[int]:
    """Widths of chunks to try, the widest first."""
    width = min(shared_bytes // (2 * TOKENS * dtype.itemsize) - 1, columns) // _LEAST_COLUMNS * _LEAST_COLUMNS
    while width > _LEAST_COLUMNS:
        yield width
        width = width * 7 // 8 // _LEAST_COLUMNS * _LEAST_COLUMNS
    yield _LEAST_COLUMNS
