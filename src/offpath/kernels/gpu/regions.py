"""The connections of a sparse weight by regions, a few rows and columns: for the gradient of its values.

A region is as many rows as columns, no more than fit: their tokens wait in shared memory while every connection
between them is multiplied. It is smaller where the weight is denser, so that a block can keep all of its sums in
registers; a region with more connections than that has several blocks. Connections come in twos of one row; of an odd
number, the last one stands twice, and its double has no place in the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offpath.kernels.errors import KernelError
from offpath.kernels.gpu.n4 import offsets
from offpath.kernels.operands import row_numbers

WARPS, TWOS = 16, 32  # of a block; of a warp
CAPACITY = WARPS * TWOS
_ROW_BYTES = 256  # of a feature in shared memory
_TWO_BYTES = 8
_FULL = 0.9  # of a block's sums that an average region has, so that most have no second block


@dataclass(frozen=True, eq=False)
class Regions:
    """A sparse pattern of `shape` (rows, columns) in regions of `side` rows and columns.

    For each block: `corners` int32 [blocks, 2], its first row and column, and `begins` int32 [blocks + 1], its first
    two connections. `twos` int32 [twos, 2]: the bytes in shared memory where both columns begin, 16 bits each, and
    where the row does. `slots` int32 [twos * 2]: the places in the CSR matrix, or -1. `nnz`: connections.
    """

    shape: tuple[int, int]
    nnz: int
    side: int
    corners: Tensor
    begins: Tensor
    twos: Tensor
    slots: Tensor

    @property
    def bytes(self) -> int:
        """Bytes of the tensors."""
        tensors = self.corners, self.begins, self.twos, self.slots
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def shared_bytes(self) -> int:
        """What a block needs."""
        return shared_bytes_of(self.side)


def shared_bytes_of(side: int) -> int:
    """Two buffers of columns and rows, and the twos of a block."""
    return 4 * side * _ROW_BYTES + _TWO_BYTES * CAPACITY


def make_regions(crow_indices: Tensor, col_indices: Tensor, columns: int, shared_bytes: int) -> Regions:
    """The regions of a canonical pattern, for blocks with so many bytes of shared memory."""
    rows, nnz = crow_indices.shape[0] - 1, col_indices.shape[0]
    # A column's place has 16 bits.
    most = min((shared_bytes - shared_bytes_of(0)) // (4 * _ROW_BYTES), 2**16 // _ROW_BYTES)
    if most < 1:
        raise KernelError(f"expected a GPU whose blocks have more than {shared_bytes:,} bytes of shared memory")
    density = nnz / max(rows * columns, 1)
    side = max(1, min(most, int(math.sqrt(_FULL * 2 * CAPACITY / density)) if density else most))
    row, column, across = row_numbers(crow_indices, nnz).long(), col_indices.long(), -(-columns // side)
    n_regions = -(-rows // side) * across
    runs = (row // side * across + column // side) * side + row % side  # a row of a region
    in_order = runs.argsort(stable=True)
    run_counts = torch.bincount(runs, minlength=n_regions * side)
    run_twos = (run_counts + 1) // 2
    sorted_runs = runs[in_order]
    nth = torch.arange(nnz, device=runs.device) - offsets(run_counts)[sorted_runs]
    places = 2 * offsets(run_twos)[sorted_runs] + nth
    # Slots that no connection has take the column of the one before them.
    slots = torch.full((2 * int(run_twos.sum()),), -1, dtype=torch.int32, device=runs.device)
    slots[places] = in_order.int()
    owners = torch.where(slots < 0, slots.roll(1), slots).long()
    column_places = (column[owners] % side * _ROW_BYTES).view(-1, 2)
    row_places = (side + row[owners[::2]] % side) * _ROW_BYTES
    columns_of_two = column_places[:, 0] | column_places[:, 1] << 16
    columns_of_two = torch.where(columns_of_two >= 2**31, columns_of_two - 2**32, columns_of_two)
    twos = torch.stack([columns_of_two, row_places], 1).int()

    counts = run_twos.view(n_regions, side).sum(1)
    blocks = (counts + CAPACITY - 1) // CAPACITY
    region_of_block = torch.arange(n_regions, device=runs.device).repeat_interleave(blocks)
    nth_block = torch.arange(region_of_block.numel(), device=runs.device) - offsets(blocks)[region_of_block]
    share = (counts + blocks - 1) // blocks.clamp(min=1)  # a region's blocks have about as many
    begins = offsets(counts)[region_of_block] + nth_block * share[region_of_block]
    begins = torch.cat([begins, begins.new_tensor([twos.shape[0]])])
    corners = torch.stack([region_of_block // across, region_of_block % across], 1) * side
    return Regions((rows, columns), nnz, side, corners.int(), begins.int(), twos, slots)
