"""The two formats of a sparse weight that the decoding kernel reads, packed from canonical CSR on any device.

Each row is a list of slots in groups of eight, so that a lane loads the values of a group in whole 16-byte words; the
groups of a row go to the lanes of a warp in turn. All lanes fetch the `x` of their first slots at once, then of their
second ones, and so on: as fast as the columns lie in different banks of shared memory, which repeat every 32 columns.

*n4* keeps the column of a group's first slot in 16 bits and the seven gaps to the next slots in 4 bits each (bits 4j to
4j + 3 for slot j), in units of `STRIDE` columns, less one. So a group stays in its bank, or in two of them, and the
groups of a row stand in the order that has one of each bank in turn. Where two connections of a bank lie more than 16
units apart, slots without a connection stand between them, 16 units apart.

*c16* keeps all eight columns in 16 bits each, and the connections of a row in the order that has one of each bank in
turn.

A slot without a connection holds the value -0.0, and none with a connection does: a zero of the weight is stored as
+0.0. So a kernel can tell them apart where that matters, which is where `x` is not finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from offpath.kernels.errors import KernelError
from offpath.kernels.gpu.n4 import (
    GROUP,
    count_groups,
    expect_slots,
    expect_values,
    groups_of,
    in_turn,
    inverse,
    low_16_bits,
    offsets,
    pack_columns,
    unpack_columns,
)

Kind = Literal["n4", "c16"]

STRIDE = 16  # columns in a unit
BANKS = 32
LANES = 32
MAX_COLUMNS = 2**16
# c16 is quicker to decode: n4 is taken where it has at most this part of its bytes (measured on an H200).
_N4_BELOW = 0.85
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Packed:
    """A sparse weight of `shape` (rows, columns) as the decoding kernel reads it.

    `group_offsets` int32 [rows + 1]: the first group of each row. `values` [groups * 8]. `columns`: 16 bits each, in
    int16 tensors whose bits are unsigned, [groups] for n4 and [groups * 8] for c16. `gaps` int32 [groups], n4 only.
    `slots` int32 [nnz]: in which slot each value of the CSR matrix lies.
    """

    kind: Kind
    shape: tuple[int, int]
    group_offsets: Tensor
    values: Tensor
    columns: Tensor
    gaps: Tensor | None
    slots: Tensor

    @property
    def n_bytes(self) -> int:
        """What a product reads, the positions of the values (`slots`) left out."""
        read = [self.group_offsets, self.values, self.columns, *([] if self.gaps is None else [self.gaps])]
        return sum(tensor.numel() * tensor.element_size() for tensor in read)


def pack(crow_indices: Tensor, col_indices: Tensor, values: Tensor, columns: int, kind: Kind | None = None) -> Packed:
    """The weight in the format `kind`, or (None) in the quicker of the two: n4 from a density of about 12 % on.

    `crow_indices`, `col_indices` int32, canonical CSR, which the caller has checked; `values` float32 or bfloat16
    [nnz]; all on one device. Raises `KernelError` for other dtypes, more than 65,536 columns, or too many groups.
    """
    _check(col_indices, values, columns)
    counts = crow_indices.long().diff()
    rows = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts, output_size=values.numel())
    if kind is None:
        kind = _quicker(counts, rows, col_indices, values.element_size())
    pack_kind = _pack_n4 if kind == "n4" else _pack_c16
    group_counts, slots, packed_columns, gaps = pack_kind(counts, rows, col_indices.long())
    group_offsets = offsets(group_counts)
    n_slots = int(group_offsets[-1]) * GROUP
    expect_slots(n_slots)
    packed = Packed(
        kind,
        (counts.numel(), columns),
        group_offsets.int(),
        torch.full((n_slots,), -0.0, dtype=values.dtype, device=values.device),
        low_16_bits(packed_columns),
        gaps,
        slots.int(),
    )
    replace_values(packed, values)
    return packed


def replace_values(packed: Packed, values: Tensor) -> None:
    """Write other values of the same connections, in CSR order, into `packed`."""
    if values.shape != packed.slots.shape or values.dtype is not packed.values.dtype:
        raise KernelError(
            f"expected {packed.slots.numel()} values of {packed.values.dtype}, got {tuple(values.shape)} of "
            f"{values.dtype}. Pack the weight anew where its connections or its dtype changed"
        )
    packed.values[packed.slots] = values + 0.0  # -0.0 becomes +0.0


def unpack(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """(crow_indices, col_indices, values): the CSR matrix, read from the bits as the kernel reads them."""
    columns = packed.columns.long() & 0xFFFF
    if packed.gaps is not None:
        columns = unpack_columns(columns, packed.gaps, STRIDE)
    bits = packed.values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[packed.values.element_size()])
    present = bits != torch.iinfo(bits.dtype).min
    group_counts = packed.group_offsets.long().diff()
    rows = torch.arange(group_counts.numel(), device=columns.device).repeat_interleave(group_counts * GROUP)[present]
    order = (rows * MAX_COLUMNS + columns[present]).argsort()
    counts = torch.bincount(rows, minlength=group_counts.numel())
    return offsets(counts).int(), columns[present][order].int(), packed.values[present][order]


def _check(col_indices: Tensor, values: Tensor, columns: int) -> None:
    if values.dtype not in DTYPES:
        raise KernelError(f"expected values of float32 or bfloat16, got {values.dtype}. Cast the module")
    if columns > MAX_COLUMNS:
        raise KernelError(
            f"expected at most {MAX_COLUMNS:,} columns, which 16 bits can name, got {columns:,}. "
            "Split the weight by columns, or use a product over the CSR indices"
        )
    expect_values(col_indices, values)


def _quicker(counts: Tensor, rows: Tensor, col_indices: Tensor, value_bytes: int) -> Kind:
    n4, c16 = count_groups(counts, rows, col_indices.long(), STRIDE), int(groups_of(counts).sum())
    return "n4" if n4 * (GROUP * value_bytes + 6) <= _N4_BELOW * c16 * GROUP * (value_bytes + 2) else "c16"


def _pack_n4(counts: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(groups of each row, slot of each connection, first column of each group, gaps of each group)."""
    packed = pack_columns(counts, rows, columns, STRIDE)
    return packed.group_counts, packed.slots, packed.first_columns, packed.gaps


def _pack_c16(counts: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(groups of each row, slot of each connection, column of each slot, None)."""
    group_counts = groups_of(counts)
    by_bank = rows * BANKS + columns % BANKS
    sorted_by_bank = by_bank.argsort(stable=True)
    bank_offsets = offsets(torch.bincount(by_bank, minlength=counts.numel() * BANKS))
    nth = torch.empty_like(by_bank)
    nth[sorted_by_bank] = torch.arange(nth.numel(), device=nth.device) - bank_offsets[by_bank[sorted_by_bank]]
    position = inverse(in_turn(rows, nth, columns % BANKS, BANKS)) - offsets(counts)[rows]
    # 32 lanes take the first 32 connections, then the next ones, until their groups are full; the last groups of a row
    # are fewer.
    full = LANES * GROUP
    lanes = (group_counts[rows] - position // full * LANES).clamp(max=LANES)
    inside = position % full
    group = offsets(group_counts)[rows] + position // full * LANES + inside % lanes
    slots = group * GROUP + inside // lanes
    slot_columns = columns.new_zeros(int(group_counts.sum()) * GROUP)
    slot_columns[slots] = columns
    return group_counts, slots, slot_columns, None
