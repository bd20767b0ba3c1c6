"""A sparse weight in tiles of 64 rows and 256 columns, as the product on the tensor cores reads it.

A tile's connections are kept as `n4.py` says, as one row of 16,384 places. A place is where the kernel writes the
connection in shared memory, and there everything lies as a lane of `mma.m16n8k16` takes it: eight numbers of 16 bits in
a row are what one lane multiplies at once. A unit of 64 places is one word of each bank, so all slots of a group are
written to one bank; and of 32 groups in a row, each stands for another bank.

A slot without a connection holds -0.0, and its place has none either, or lies behind the tile: it may be written like
any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offpath.kernels.errors import KernelError
from offpath.kernels.gpu.n4 import (
    GROUP,
    expect_slots,
    expect_values,
    low_16_bits,
    offsets,
    pack_columns,
    unpack_columns,
)
from offpath.kernels.operands import row_numbers

TILE_ROWS, TILE_COLUMNS = 64, 256
PLACES = TILE_ROWS * TILE_COLUMNS
STRIDE = 64  # places in a unit
_BANKS = 32


@dataclass(frozen=True)
class Tiles:
    """A sparse weight of `shape` (rows, columns) in tiles, those of the first 64 rows first, by their columns.

    `group_offsets` int32 [tiles + 1]: the first group of each tile. `values` bfloat16 [groups * 8]. `places` [groups]:
    of a group's first slot, 16 bits. `gaps` int32 [groups]: the seven to the others.
    """

    shape: tuple[int, int]
    group_offsets: Tensor
    values: Tensor
    places: Tensor
    gaps: Tensor

    @property
    def n_bytes(self) -> int:
        """What a product reads."""
        read = self.group_offsets, self.values, self.places, self.gaps
        return sum(tensor.numel() * tensor.element_size() for tensor in read)


def pack_tiles(crow_indices: Tensor, col_indices: Tensor, values: Tensor, columns: int) -> Tiles:
    """The weight in tiles.

    `crow_indices`, `col_indices` int32, canonical CSR, which the caller has checked; `values` bfloat16 [nnz]; all on
    one device. Raises `KernelError` for another dtype, or too many slots.
    """
    if values.dtype is not torch.bfloat16:
        raise KernelError(
            f"expected values of bfloat16, which tensor cores multiply, got {values.dtype}. Cast the module"
        )
    expect_values(col_indices, values)
    shape = crow_indices.shape[0] - 1, columns
    rows = row_numbers(crow_indices, col_indices.shape[0]).long()
    tiles, places = _places(rows, col_indices.long(), columns)
    order = (tiles * PLACES + places).argsort()
    counts = torch.bincount(tiles, minlength=-(-shape[0] // TILE_ROWS) * _tiles_across(columns))
    packed = pack_columns(counts, tiles[order], places[order], STRIDE, _turns)
    n_slots = packed.gaps.numel() * GROUP
    expect_slots(n_slots)
    slot_values = torch.full((n_slots,), -0.0, dtype=values.dtype, device=values.device)
    slot_values[packed.slots] = values[order] + 0.0  # -0.0 becomes +0.0
    group_offsets = offsets(packed.group_counts).int()
    return Tiles(shape, group_offsets, slot_values, low_16_bits(packed.first_columns), packed.gaps)


def unpack_tiles(tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """(crow_indices, col_indices, values): the CSR matrix, read from the bits as the kernel reads them."""
    places = unpack_columns(tiles.places.long() & 0xFFFF, tiles.gaps, STRIDE)
    present = tiles.values.view(torch.int16) != torch.iinfo(torch.int16).min
    slot_counts = tiles.group_offsets.long().diff() * GROUP
    owners = torch.arange(slot_counts.numel(), device=places.device).repeat_interleave(slot_counts)
    rows, columns = _positions(owners[present], places[present], tiles.shape[1])
    order = (rows * tiles.shape[1] + columns).argsort()
    crow_indices = offsets(torch.bincount(rows, minlength=tiles.shape[0])).int()
    return crow_indices, columns[order].int(), tiles.values[present][order]


def _tiles_across(columns: int) -> int:
    return -(-columns // TILE_COLUMNS)


def _turns(left: Tensor) -> Tensor:
    """Two numbers of 16 bits share a word: first those that are first in theirs, one of each bank."""
    return left % 2 * _BANKS + left // 2


def _places(rows: Tensor, columns: Tensor, n_columns: int) -> tuple[Tensor, Tensor]:
    """(tile, place in it) of each connection.

    Four fragments of 16 rows, each of eight runs of 32 columns in two steps. Of a step, lane 4 i + j holds rows i and
    i + 8, columns 8 j to 8 j + 3 or 8 j + 4 to 8 j + 7: the words of both rows in turn.
    """
    tiles = rows // TILE_ROWS * _tiles_across(n_columns) + columns // TILE_COLUMNS
    row, column = rows % TILE_ROWS, columns % TILE_COLUMNS
    steps = (row // 16 * (TILE_COLUMNS // 32) + column // 32) * 2 + column % 8 // 4
    lanes = row % 8 * 4 + column % 32 // 8
    words = column % 4 // 2 * 2 + row % 16 // 8
    return tiles, ((steps * 32 + lanes) * 4 + words) * 2 + column % 2


def _positions(tiles: Tensor, places: Tensor, n_columns: int) -> tuple[Tensor, Tensor]:
    """(row, column) of each place in its tile."""
    words, lanes, steps = places // 2 % 4, places // 8 % 32, places // 256
    runs = steps // 2
    row = runs // (TILE_COLUMNS // 32) * 16 + words % 2 * 8 + lanes // 4
    column = runs % (TILE_COLUMNS // 32) * 32 + lanes % 4 * 8 + steps % 2 * 4 + words // 2 * 2 + places % 2
    across = _tiles_across(n_columns)
    return tiles // across * TILE_ROWS + row, tiles % across * TILE_COLUMNS + column
