"""What the ops need to know of a pair of index tensors, found out once and recognised by content.

A layer's topology is its two index buffers, and anyone may write into them: `load_state_dict`, `.data`, NumPy, a
broadcast of `DistributedDataParallel`. torch counts only some of these writes. So every call takes a digest of the
contents (about 3 % of a training step at 90 % and batch 256), and all that follows from them - the check, a private
copy that nobody else can write into, the transpose, the plans - is made anew when it differs. Kernels read
the private copy and the plans alone: a write between digest and kernel cannot lead them outside a tensor.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from offpath.kernels import Backend
from offpath.pattern import Pattern


class Prepared:
    """A private, checked copy of a pattern, and the plans that backends made of it and of its transpose."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self._plans: dict[tuple[str, torch.dtype, bool], Any] = {}

    def spmm(self, backend: Backend, values: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """x @ W.T + bias, for x [batch, columns]."""
        if x.shape[0] >= 64:
            return backend.planned_spmm(self._plan(backend, values.dtype, transposed=False), values, x, bias)
        return backend.spmm(self.pattern.crow_indices, self.pattern.col_indices, values, x, bias)

    def spmm_transposed(self, backend: Backend, values: Tensor, dy: Tensor) -> Tensor:
        """dy @ W, for dy [batch, rows]."""
        if dy.shape[0] >= 64:
            return backend.planned_spmm(self._plan(backend, values.dtype, transposed=True), values, dy)
        crow_indices, col_indices, permutation = self.pattern.transpose()
        return backend.spmm(crow_indices, col_indices, values.index_select(0, permutation), dy)

    @property
    def bytes(self) -> int:
        """Bytes of the copy, its transpose and the plans."""
        return self.pattern.index_bytes + sum(plan.bytes for plan in self._plans.values())

    def _plan(self, backend: Backend, dtype: torch.dtype, transposed: bool) -> Any:
        key = backend.name, dtype, transposed
        plan = self._plans.get(key)
        if plan is None:
            rows, columns = self.pattern.shape
            if transposed:
                crow_indices, col_indices, permutation = self.pattern.transpose()
                plan = backend.plan(crow_indices, col_indices, rows, dtype, permutation)
            else:
                plan = backend.plan(self.pattern.crow_indices, self.pattern.col_indices, columns, dtype)
            self._plans[key] = plan
        return plan


class _Entry:
    __slots__ = ("__weakref__", "col_indices", "digest", "prepared")

    def __init__(self, col_indices: weakref.ref[Tensor], digest: int, prepared: Prepared) -> None:
        self.col_indices = col_indices
        self.digest = digest
        self.prepared = prepared


# Keyed by id(col_indices). An id can be reused once its tensor has died, so a hit counts only if the weak reference
# still leads to the tensor that was asked about.
_entries: dict[int, _Entry] = {}


def prepare(backend: Backend, crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int]) -> Prepared:
    """What is known of these connections, kept for as long as `col_indices` lives.

    A backend that cannot tell one content from another (the reference) has it made anew in every call.
    Raises `PatternError` when the tensors are not canonical CSR of `shape`.
    """
    if backend.digest is None:
        return Prepared(Pattern(shape, crow_indices, col_indices))
    key = id(col_indices)
    found = _entries.get(key)
    now = backend.digest(crow_indices, col_indices)
    if (
        found is not None
        and found.digest == now
        and found.col_indices() is col_indices
        and found.prepared.pattern.shape == shape
        and found.prepared.pattern.nnz == col_indices.shape[0]
    ):
        return found.prepared
    prepared = Prepared(Pattern(shape, crow_indices.clone(), col_indices.clone()))
    entry = _Entry(weakref.ref(col_indices, lambda _: _forget(key, entry_ref)), now, prepared)
    entry_ref = weakref.ref(entry)
    _entries[key] = entry
    return prepared


def prepared_bytes(col_indices: Tensor) -> int:
    """Bytes that are kept beside these index tensors: the private copy, its transpose, the plans."""
    found = _entries.get(id(col_indices))
    return found.prepared.bytes if found is not None and found.col_indices() is col_indices else 0


def _forget(key: int, entry: weakref.ref[_Entry]) -> None:
    if _entries.get(key) is entry():
        _entries.pop(key, None)
