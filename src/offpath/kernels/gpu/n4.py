"""Columns in 16 bits a group of eight and 4-bit gaps: how the slots of a sparse row are found, and their order.

A row's connections are dealt into segments by what is left of their column when it is divided by `stride`; inside of
a segment, columns are counted in units of `stride`. Each segment is a list of whole groups. So all the columns of a
group lie in the same bank of shared memory, or in two of them, and the groups of a row stand in the order that has one
of each segment in turn. `formats.py` says what the bits are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from offpath.kernels.errors import KernelError

GROUP = 8  # slots
MAX_GAP = 16  # units, what 4 bits hold
MAX_SLOTS = 2**31 - 1


@dataclass(frozen=True)
class Columns:
    """Where the connections of some rows lie, and the bits that say so.

    `group_counts` [rows]. `slots` [nnz]: the slot of each connection. `first_columns` [groups], `gaps` int32 [groups].
    """

    group_counts: Tensor
    slots: Tensor
    first_columns: Tensor
    gaps: Tensor


def expect_values(col_indices: Tensor, values: Tensor) -> None:
    """Raises `KernelError` unless each connection has a value, on one device."""
    if col_indices.shape != values.shape or col_indices.device != values.device:
        raise KernelError(
            f"expected as many values as column indices, on one device, got {tuple(values.shape)} on {values.device} "
            f"and {tuple(col_indices.shape)} on {col_indices.device}"
        )


def expect_slots(n_slots: int) -> None:
    """Raises `KernelError` for more slots than a kernel counts."""
    if n_slots > MAX_SLOTS:
        raise KernelError(f"expected at most {MAX_SLOTS:,} slots in a weight, got {n_slots:,}. Split it by rows")


def pack_columns(
    counts: Tensor, rows: Tensor, columns: Tensor, stride: int, turns: Callable[[Tensor], Tensor] = lambda place: place
) -> Columns:
    """The packed form of connections `(rows, columns)` int64 [nnz], sorted by both; `counts` [rows] has each row's.

    `turns` says which of a row's segments, named by what is left of the column, has its groups first, second, ...
    """
    order, segments, slot_counts, fillers = _segments(counts, rows, columns, stride)
    group_counts = groups_of(slot_counts)
    first_groups = offsets(group_counts)
    before = offsets(slot_counts)[segments]  # slots of the segments before, if none had to be whole groups
    slots = (fillers + 1).cumsum(0) - 1 - before + first_groups[segments] * GROUP
    n_groups = int(first_groups[-1])
    places = _fill(columns[order] // stride, slots, fillers, n_groups)
    # One group of each segment in turn.
    owners = torch.arange(slot_counts.numel(), device=rows.device).repeat_interleave(group_counts, output_size=n_groups)
    nth = torch.arange(n_groups, device=rows.device) - first_groups[owners]
    turn = in_turn(owners // stride, nth, turns(owners % stride), stride)
    position = inverse(turn)
    slots_in_order = torch.empty_like(slots)
    slots_in_order[order] = position[slots // GROUP] * GROUP + slots % GROUP
    first_columns = places[:, 0] * stride + owners % stride
    return Columns(group_counts.view(-1, stride).sum(1), slots_in_order, first_columns[turn], _gaps(places)[turn])


def unpack_columns(first_columns: Tensor, gaps: Tensor, stride: int) -> Tensor:
    """The column of every slot int64 [groups * 8], from the bits."""
    shifts = torch.arange(0, 32, 4, device=gaps.device, dtype=torch.int32)
    steps = (((gaps[:, None] >> shifts) & 15) + 1).long() * stride
    steps[:, 0] = first_columns
    return steps.cumsum(1).flatten()


def count_groups(counts: Tensor, rows: Tensor, columns: Tensor, stride: int) -> int:
    """How many groups `pack_columns` makes."""
    return int(groups_of(_segments(counts, rows, columns, stride)[2]).sum())


def in_turn(rows: Tensor, nth: Tensor, turns: Tensor, n_turns: int) -> Tensor:
    """The order by row, then the first of each turn, then the second of each turn, and so on."""
    most = int(nth.max()) + 1 if nth.numel() else 1
    return ((rows * most + nth) * n_turns + turns).argsort()


def inverse(order: Tensor) -> Tensor:
    """Where each place of `order` went."""
    inverted = torch.empty_like(order)
    inverted[order] = torch.arange(order.numel(), device=order.device)
    return inverted


def offsets(counts: Tensor) -> Tensor:
    """0 and the running sums of `counts`."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def groups_of(slot_counts: Tensor) -> Tensor:
    """How many groups hold so many slots."""
    return (slot_counts + GROUP - 1) // GROUP


def low_16_bits(columns: Tensor) -> Tensor:
    """Numbers below 2^16 as int16 of the same bits."""
    return torch.where(columns >= 2**15, columns - 2**16, columns).short()


def _segments(counts: Tensor, rows: Tensor, columns: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The connections sorted by segment: (order, segment of each, slots of each segment, fillers before each)."""
    order = (rows * stride + columns % stride).argsort(stable=True)
    segments = (rows * stride + columns % stride)[order]
    gaps = (columns[order] // stride).diff()
    fillers = torch.zeros_like(segments)
    fillers[1:] = torch.where(segments.diff() == 0, (gaps - 1) // MAX_GAP, 0)
    slot_counts = torch.zeros(counts.numel() * stride, dtype=torch.int64, device=counts.device)
    return order, segments, slot_counts.index_add(0, segments, fillers + 1), fillers


def _fill(places: Tensor, slots: Tensor, fillers: Tensor, n_groups: int) -> Tensor:
    """The place of every slot [groups, 8]: fillers stand 16 apart, and what is left at the end of a segment 1 apart."""
    filled = torch.full((n_groups * GROUP,), -1, device=slots.device)
    filled[slots] = places
    where = fillers.nonzero().flatten()
    n_fillers = fillers[where]
    total = int(n_fillers.sum())
    owner = torch.arange(where.numel(), device=slots.device).repeat_interleave(n_fillers, output_size=total)
    nth = torch.arange(total, device=slots.device) - offsets(n_fillers)[owner]
    filled[slots[where][owner] - n_fillers[owner] + nth] = places[where - 1][owner] + MAX_GAP * (nth + 1)
    # What is left has a slot with a place before it in its own group.
    position = torch.arange(filled.numel(), device=slots.device)
    last = torch.where(filled >= 0, position, 0).cummax(0).values
    return (filled[last] + position - last).view(-1, GROUP)


def _gaps(places: Tensor) -> Tensor:
    less_one = places.diff(dim=1) - 1
    shifts = torch.arange(4, 32, 4, device=places.device)
    packed = (less_one << shifts).sum(1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()
