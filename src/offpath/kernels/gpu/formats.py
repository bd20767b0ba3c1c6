"""The two formats of a sparse weight that the decoding kernel reads, packed from canonical CSR on any device.

Each row is a list of slots in groups of eight, so that a lane loads the values of a group in whole 16-byte words.

*n4* keeps the column of a group's first slot in 16 bits and the seven gaps to the next slots, less one, in 4 bits each
(bits 4j to 4j + 3 for slot j). Where two connections lie more than 16 columns apart, slots without a connection stand
between them, 16 columns apart. *c16* keeps all eight columns in 16 bits.

A slot without a connection holds the value -0.0, and none with a connection does: a zero of the weight is stored as
+0.0. So a kernel can tell them apart where that matters, which is where `x` is not finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from offpath.kernels.errors import KernelError

Kind = Literal["n4", "c16"]

GROUP = 8  # slots
MAX_GAP = 16  # columns, what 4 bits hold
MAX_COLUMNS = 2**16
MAX_GROUPS = 2**31 - 1
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
    """The weight in the format `kind`, or (None) in the smaller of the two: n4 from a density of about 7 % on.

    `crow_indices`, `col_indices` int32, canonical CSR, which the caller has checked; `values` float32 or bfloat16
    [nnz]; all on one device. Raises `KernelError` for other dtypes, more than 65,536 columns, or too many groups.
    """
    _check(col_indices, values, columns)
    counts = crow_indices.long().diff()
    rows = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts, output_size=values.numel())
    fillers = _fillers(rows, col_indices)
    if kind is None:
        kind = _smaller(counts, rows, fillers, values.element_size())
    if kind == "c16":
        fillers = torch.zeros_like(fillers)
    slots, group_offsets = _place(counts, rows, fillers)
    n_groups = int(group_offsets[-1])
    if n_groups > MAX_GROUPS // GROUP:
        raise KernelError(f"expected at most {MAX_GROUPS:,} slots in one weight, got {n_groups * GROUP:,}. Split it")
    slot_columns = _slot_columns(col_indices, slots, fillers, n_groups, step=1 if kind == "n4" else 0)
    packed = Packed(
        kind,
        (counts.numel(), columns),
        group_offsets.int(),
        torch.full((n_groups * GROUP,), -0.0, dtype=values.dtype, device=values.device),
        _low_16_bits(slot_columns if kind == "c16" else slot_columns[::GROUP]),
        _gaps(slot_columns) if kind == "n4" else None,
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
    columns = packed.columns.int() & 0xFFFF
    if packed.gaps is not None:
        shifts = torch.arange(0, 32, 4, device=columns.device, dtype=torch.int32)
        gaps = ((packed.gaps[:, None] >> shifts) & 15) + 1
        gaps[:, 0] = columns
        columns = gaps.cumsum(1).flatten()
    bits = packed.values.view(torch.int16 if packed.values.element_size() == 2 else torch.int32)
    present = bits != torch.iinfo(bits.dtype).min
    ends = torch.cat([present.new_zeros(1, dtype=torch.int64), present.cumsum(0)])
    return ends[packed.group_offsets.long() * GROUP].int(), columns[present].int(), packed.values[present]


def _check(col_indices: Tensor, values: Tensor, columns: int) -> None:
    if values.dtype not in DTYPES:
        raise KernelError(f"expected values of float32 or bfloat16, got {values.dtype}. Cast the module")
    if columns > MAX_COLUMNS:
        raise KernelError(
            f"expected at most {MAX_COLUMNS:,} columns, which 16 bits can name, got {columns:,}. "
            "Split the weight by columns, or use a product over the CSR indices"
        )
    if col_indices.shape != values.shape or col_indices.device != values.device:
        raise KernelError(
            f"expected as many values as column indices, on one device, got {tuple(values.shape)} on {values.device} "
            f"and {tuple(col_indices.shape)} on {col_indices.device}"
        )


def _fillers(rows: Tensor, col_indices: Tensor) -> Tensor:
    """How many slots without a connection n4 needs before each connection."""
    fillers = torch.zeros_like(rows)
    same_row = rows.diff() == 0
    fillers[1:] = torch.where(same_row, (col_indices.diff().long() - 1) // MAX_GAP, 0)
    return fillers


def _smaller(counts: Tensor, rows: Tensor, fillers: Tensor, value_bytes: int) -> Kind:
    n4_slots = counts.index_add(0, rows, fillers)
    n4, c16 = (int(((slots + GROUP - 1) // GROUP).sum()) for slots in (n4_slots, counts))
    return "n4" if n4 * (GROUP * value_bytes + 6) <= c16 * GROUP * (value_bytes + 2) else "c16"


def _place(counts: Tensor, rows: Tensor, fillers: Tensor) -> tuple[Tensor, Tensor]:
    """The slot of each connection, and the first group of each row."""
    ends = (fillers + 1).cumsum(0)  # slots up to and with each connection, if rows had no need of whole groups
    row_slots = counts.index_add(0, rows, fillers)
    row_ends = row_slots.cumsum(0)
    group_offsets = torch.cat([counts.new_zeros(1), ((row_slots + GROUP - 1) // GROUP).cumsum(0)])
    return ends - 1 - (row_ends - row_slots)[rows] + group_offsets[rows] * GROUP, group_offsets


def _slot_columns(col_indices: Tensor, slots: Tensor, fillers: Tensor, n_groups: int, step: int) -> Tensor:
    """The column of every slot: fillers stand 16 apart, and those at the end of a row `step` apart."""
    columns = torch.full((n_groups * GROUP,), -1, dtype=torch.int32, device=slots.device)
    columns[slots] = col_indices
    where = fillers.nonzero().flatten()
    n_fillers = fillers[where]
    first = n_fillers.cumsum(0) - n_fillers
    total = int(n_fillers.sum())
    owner = torch.arange(where.numel(), device=slots.device).repeat_interleave(n_fillers, output_size=total)
    nth = torch.arange(total, device=slots.device) - first[owner]
    columns[slots[where][owner] - n_fillers[owner] + nth] = (
        col_indices[where - 1][owner].long() + MAX_GAP * (nth + 1)
    ).int()
    # What is left ends a row, and has a slot with a column before it in its own group.
    position = torch.arange(columns.numel(), device=slots.device)
    last = torch.where(columns >= 0, position, 0).cummax(0).values
    return columns[last] + step * (position - last).int()


def _gaps(slot_columns: Tensor) -> Tensor:
    less_one = slot_columns.view(-1, GROUP).diff(dim=1).long() - 1
    shifts = torch.arange(4, 32, 4, device=slot_columns.device)
    packed = (less_one << shifts).sum(1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def _low_16_bits(columns: Tensor) -> Tensor:
    return torch.where(columns >= 2**15, columns - 2**16, columns).short()
