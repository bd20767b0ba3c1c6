"""Changing a pattern: a new `Pattern`, and where every old value went."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from offpath.pattern.build import from_positions
from offpath.pattern.pattern import Pattern, PatternError


@dataclass(frozen=True, eq=False)
class Edit:
    """The outcome of an edit: `source` became `pattern`.

    `old_to_new` (int32 [old nnz]) holds the new slot of each old one, or -1 where the connection was dropped;
    `new_to_old` (int32 [new nnz]) the old slot of each new one, or -1 where the connection was grown.
    """

    source: Pattern
    pattern: Pattern
    old_to_new: Tensor
    new_to_old: Tensor

    def carry(self, slots: Tensor, fill: float = 0.0) -> Tensor:
        """Move a tensor of one entry per old slot to the new slots; grown connections get `fill`.

        Survivors keep their bits. Works for values and for any nnz-sized optimizer state.
        Raises `PatternError` when `slots` does not have one entry per old slot.
        """
        if slots.shape != self.old_to_new.shape:
            raise PatternError(
                f"expected one entry for each of the {self.old_to_new.numel()} old slots, "
                f"got shape {tuple(slots.shape)}"
            )
        if not slots.numel():
            return slots.new_full(self.new_to_old.shape, fill)
        # A gather of everything and a fill of the few: half the time of a gather of the survivors alone.
        carried = slots.index_select(0, self._sources)
        return carried.index_fill_(0, self.grown_slots, fill)

    @cached_property
    def grown_slots(self) -> Tensor:
        """The new slots of the grown connections, ascending, int64."""
        return (self.new_to_old < 0).nonzero().squeeze(1)

    @cached_property
    def _sources(self) -> Tensor:
        return self.new_to_old.clamp(min=0)


def edit(
    pattern: Pattern,
    drop: Tensor | None = None,
    grow: tuple[Tensor, Tensor] | None = None,
) -> Edit:
    """Drop the slots `drop` and grow the connections at `grow = (rows, columns)`; O(nnz) memory.

    `drop` holds distinct slots of `pattern`; the grown positions must be distinct and free once `drop` is done (a
    dropped connection may be grown again: it then counts as new). Raises `PatternError` otherwise.

    >>> import torch
    >>> from offpath.pattern import from_mask
    >>> before = from_mask(torch.tensor([[True, True, False], [False, True, False]]))
    >>> change = edit(before, drop=torch.tensor([0]), grow=(torch.tensor([1]), torch.tensor([2])))
    >>> change.pattern.to_mask().int().tolist()
    [[0, 1, 0], [0, 1, 1]]
    >>> change.old_to_new.tolist(), change.new_to_old.tolist()
    ([-1, 0, 1], [1, 2, -1])
    """
    survives = torch.ones(pattern.nnz, dtype=torch.bool, device=pattern.device)
    if drop is not None:
        _check_drop(pattern, drop)
        survives.index_fill_(0, drop.long(), False)
    survivors = survives.nonzero().squeeze(1)
    if drop is not None and survivors.numel() + drop.numel() != pattern.nnz:
        raise PatternError("expected distinct slots to drop, got duplicates")
    kept = pattern.positions().index_select(0, survivors)
    grown = kept.new_empty(0) if grow is None else _grown_positions(pattern, *grow)

    # Both lists are sorted: a grown connection's new slot is its place among the grown plus the survivors before it,
    # and the survivors have the slots that remain.
    before = torch.searchsorted(kept, grown)
    _check_free(pattern, kept, grown, before)
    grown_slots = torch.arange(grown.numel(), device=kept.device) + before
    stays = torch.ones(kept.numel() + grown.numel(), dtype=torch.bool, device=kept.device)
    stays.index_fill_(0, grown_slots, False)
    kept_slots = stays.nonzero().squeeze(1)
    # scatter_ takes a third of the time of an assignment through an index.
    merged = kept.new_empty(stays.numel()).scatter_(0, kept_slots, kept).scatter_(0, grown_slots, grown)
    old_to_new = torch.full((pattern.nnz,), -1, dtype=torch.int32, device=kept.device)
    old_to_new.scatter_(0, survivors, kept_slots.int())
    new_to_old = torch.full((merged.numel(),), -1, dtype=torch.int32, device=kept.device)
    new_to_old.scatter_(0, kept_slots, survivors.int())
    return Edit(pattern, from_positions(merged, pattern.shape), old_to_new, new_to_old)


def _check_drop(pattern: Pattern, drop: Tensor) -> None:
    if drop.dim() != 1 or drop.dtype not in (torch.int32, torch.int64):
        raise PatternError(f"expected drop to be a 1-D integer tensor of slots, got {drop.dtype} {tuple(drop.shape)}")
    if drop.numel() and not (int(drop.min()) >= 0 and int(drop.max()) < pattern.nnz):
        raise PatternError(f"expected slots in [0, {pattern.nnz}) to drop, got {int(drop.min())} to {int(drop.max())}")


def _grown_positions(pattern: Pattern, rows: Tensor, columns: Tensor) -> Tensor:
    if rows.dim() != 1 or rows.shape != columns.shape:
        raise PatternError(
            f"expected as many rows as columns to grow, got shapes {tuple(rows.shape)} and {tuple(columns.shape)}"
        )
    for name, index, size in (("rows", rows, pattern.shape[0]), ("columns", columns, pattern.shape[1])):
        if index.dtype not in (torch.int32, torch.int64):
            raise PatternError(f"expected integer {name} to grow, got {index.dtype}")
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < size):
            raise PatternError(f"expected {name} in [0, {size}) to grow, got {int(index.min())} to {int(index.max())}")
    grown = rows.long() * pattern.shape[1] + columns.long()
    if bool((grown[1:] > grown[:-1]).all()):
        return grown
    grown = grown.unique()
    if grown.numel() != rows.numel():
        raise PatternError("expected distinct connections to grow, got duplicates")
    return grown


def _check_free(pattern: Pattern, kept: Tensor, grown: Tensor, before: Tensor) -> None:
    """`before` holds, for each grown position, how many survivors stand before it."""
    if not kept.numel():
        return
    taken = kept.index_select(0, before.clamp(max=kept.numel() - 1)) == grown
    if bool(taken.any()):
        row, column = divmod(int(grown[taken][0]), pattern.shape[1])
        raise PatternError(f"expected free positions to grow, but ({row}, {column}) is already a connection")
