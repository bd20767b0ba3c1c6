"""What the ops need to know of a pair of index tensors, found out once.

Whoever calls the ops with index tensors of his own may write into them: in place, through `.data`, with NumPy; torch
counts only some of these writes. So such tensors are recognised by a digest of their contents in every call, and all
that follows from them - the check, a private copy, the transpose, the plans - is made anew when it differs. Kernels
read the private copy and the plans alone: a write between digest and kernel cannot lead them outside a tensor.

A layer spares itself the digest (at batch 1 it would cost more than the product): it owns `Connections`, whose tensors
nobody else gets to see. While inference is all that it is asked for, it keeps one bit per position and no columns.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

from offpath.kernels import Backend
from offpath.ops.library import is_in_a_mode, is_tracing, is_transforming
from offpath.ops.prepared_products import Prepared
from offpath.pattern import Pattern

_Result = TypeVar("_Result")


class Connections:
    """A pattern that only its owner can change: ops need not look whether it did.

    Copies the pattern. `crow_indices` and `col_indices` are for the ops alone; who writes into them gets wrong numbers.
    As long as nobody has asked for `col_indices`, `let_columns_go` keeps the bits of the pattern alone, in which they
    are found again when somebody does. Where a compiler has seen one layer, all keep theirs (`keep_all_columns`).
    Copies and pickles are `Connections` of their own.

    >>> from offpath import pattern as patterns
    >>> connections = Connections(patterns.full((2, 3)))
    >>> x, values = torch.ones(1, 3), torch.arange(6.0)
    >>> torch.ops.offpath.sparse_linear(x, values, None, connections.crow_indices, connections.col_indices)
    tensor([[ 3., 12.]])
    """

    def __init__(self, pattern: Pattern) -> None:
        with torch.inference_mode(False):  # or the layer could never be trained
            own = Pattern(pattern.shape, pattern.crow_indices.clone(), pattern.col_indices.clone())
            # Other tensor objects over the same memory: what is remembered must not keep its own key alive. By the name
            # of this one ops find what is known; it stays when its memory goes.
            self.crow_indices, self._col_indices = own.crow_indices.detach(), own.col_indices.detach()
        self._prepared = Prepared(own)
        self._handed_out = self._are_gone = False
        self._changing = Lock()
        with _counting:
            _living.add(self)
        _remember(self._col_indices, None, self._prepared)

    @property
    def col_indices(self) -> Tensor:
        """The column of each connection, int32 [nnz]."""
        if not torch.compiler.is_compiling():  # then all have been handed out
            self.hand_out()
        return self._col_indices

    def hand_out(self) -> None:
        """See to it that `col_indices` hold numbers, from now on: somebody has them."""
        if self._handed_out:
            return
        with self._changing:
            if self._are_gone:
                _without_modes(self._bring_back)
                self._are_gone = False
            self._handed_out = True

    def let_columns_go(self, backend: Backend) -> None:
        """Keep the bits that `backend` has made of the pattern, if it has, in place of columns that nobody has."""
        matrix = self._prepared.matrix
        if self._handed_out or self._are_gone or _Compilers.have_come or not matrix.can_let_columns_go(backend):
            return
        with self._changing, torch.inference_mode(False):
            if not (self._handed_out or self._are_gone or _Compilers.have_come):
                matrix.let_columns_go(backend)
                nothing = torch.empty(self.nnz, dtype=torch.int32, device=self.device)
                nothing.untyped_storage().resize_(0)
                self._col_indices.data = nothing
                self._are_gone = True

    def _bring_back(self) -> None:
        with torch.inference_mode(False):
            self._col_indices.data = self._prepared.matrix.col_indices

    def known(self, backend: Backend, columns: int) -> Prepared:
        """What `prepare` knows of them as a matrix of so many columns; raises `PatternError` if they are not that."""
        shape = self._prepared.shape[0], columns
        if shape != self._prepared.shape:
            self.hand_out()  # they will be looked at
        return prepare(backend, self.crow_indices, self._col_indices, shape)

    @property
    def nnz(self) -> int:
        """Number of connections."""
        return self._prepared.nnz

    @property
    def device(self) -> torch.device:
        """Where the index tensors are."""
        return self.crow_indices.device

    @property
    def is_meta(self) -> bool:
        """Whether there are sizes and no numbers."""
        return self.crow_indices.is_meta

    @property
    def pattern(self) -> Pattern:
        """A copy as a frozen `Pattern`."""
        return Pattern(self._prepared.shape, self.crow_indices.clone(), self.copy_of_columns())

    def copy_of_columns(self) -> Tensor:
        """A copy of `col_indices`, which may stay away."""
        return self._columns.clone()

    def are_those_of(self, pattern: Pattern) -> bool:
        """Whether `pattern` has the same connections, on the same device; never of what is on meta."""
        return (
            self._prepared.shape == pattern.shape
            and self.device == pattern.device
            and not self.is_meta
            and torch.equal(self.crow_indices, pattern.crow_indices)
            and torch.equal(self._columns, pattern.col_indices)
        )

    def same_or_new(self, pattern: Pattern) -> Connections:
        """These connections, with all that was prepared from them, if they are those of `pattern` on its device."""
        return self if self.are_those_of(pattern) else Connections(pattern)

    def outdate(self) -> None:
        """Say that values no longer belong here: autograd refuses a backward pass of a graph from before."""
        if not (self.is_meta or self._col_indices.is_inference()):
            torch.autograd.graph.increment_version(self._col_indices)

    @property
    def bytes(self) -> int:
        """Bytes of the indices that are kept and of all that was prepared from them."""
        return self._prepared.bytes

    @property
    def index_bytes(self) -> int:
        """Bytes of `crow_indices` and `col_indices`, kept or not."""
        return self.crow_indices.element_size() * (self.crow_indices.numel() + self.nnz)

    def digest(self) -> int:
        """A fingerprint of the contents, the same in every process; 0 on the meta device."""
        if self.is_meta:
            return 0
        together = torch.cat([self.crow_indices, self._columns]).cpu().numpy().tobytes()
        return int.from_bytes(hashlib.blake2b(together, digest_size=8).digest(), "little", signed=True)

    def to(self, device: torch.device) -> Connections:
        """These connections on `device`: the same object when they are there already."""
        return self if self.device == device else Connections(self._own_pattern.to(device))

    @property
    def _columns(self) -> Tensor:
        """To be looked at, and no more: the kernels' own, where they are kept.

        Not `col_indices`, whose memory another thread may let go.
        """
        kept = self._prepared.matrix.kept_columns
        return _without_modes(self._prepared.matrix.find_columns) if kept is None else kept

    @property
    def _own_pattern(self) -> Pattern:
        return Pattern(self._prepared.shape, self._prepared.crow_indices, self._columns)

    def __reduce__(self) -> tuple[type[Connections], tuple[Pattern]]:
        # Not a copy: what is sent to another process through shared memory has to live until it has arrived.
        self.hand_out()
        return Connections, (self._own_pattern,)

    def __deepcopy__(self, memo: dict) -> Connections:
        return Connections(self._own_pattern)


class _Compilers:
    have_come = False


_living: weakref.WeakSet[Connections] = weakref.WeakSet()
_counting = Lock()


def keep_all_columns() -> None:
    """Let every layer of this process keep its columns, and bring those back that have gone: a compiler has come.

    What it makes of one layer serves others, and the same with another topology, without a word to them; and it may do
    with their tensors whatever it likes.
    """
    _Compilers.have_come = True
    with _counting:
        living = list(_living)
    for connections in living:
        connections.hand_out()


def _without_modes(make: Callable[[], _Result]) -> _Result:
    """What `make` returns where no mode, transform or tracer of the caller's makes something else of tensors."""
    if not (is_in_a_mode() or is_transforming() or is_tracing()):
        return make()
    with ThreadPoolExecutor(max_workers=1) as helper:
        return helper.submit(make).result()


class _Entry:
    __slots__ = ("__weakref__", "col_indices", "digest", "prepared")

    def __init__(self, col_indices: weakref.ref[Tensor], digest: int | None, prepared: Prepared) -> None:
        self.col_indices = col_indices
        self.digest = digest  # None: the tensors belong to `Connections`
        self.prepared = prepared


# Keyed by id(col_indices). An id can be reused once its tensor has died, so a hit counts only if the weak reference
# still leads to the tensor that was asked about.
_entries: dict[int, _Entry] = {}


def prepare(backend: Backend, crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int]) -> Prepared:
    """What is known of these connections, kept for as long as `col_indices` lives.

    A backend that cannot tell one content from another (the reference) has it made anew in every call.
    Raises `PatternError` when the tensors are not canonical CSR of `shape`.
    """
    found = _entries.get(id(col_indices))
    if found is not None and (found.col_indices() is not col_indices or found.prepared.shape != shape):
        found = None
    if found is not None and found.digest is None and found.prepared.crow_indices.data_ptr() == crow_indices.data_ptr():
        return found.prepared
    if backend.digest is None:
        return Prepared(Pattern(shape, crow_indices, col_indices))
    now = backend.digest(crow_indices, col_indices)
    if found is not None and found.digest == now and found.prepared.nnz == col_indices.shape[0]:
        return found.prepared
    prepared = Prepared(Pattern(shape, crow_indices.clone(), col_indices.clone()))
    _remember(col_indices, now, prepared)
    return prepared


def _remember(col_indices: Tensor, digest: int | None, prepared: Prepared) -> None:
    key = id(col_indices)
    entry = _Entry(weakref.ref(col_indices, lambda _: _forget(key, entry_ref)), digest, prepared)
    entry_ref = weakref.ref(entry)
    _entries[key] = entry


def _forget(key: int, entry: weakref.ref[_Entry]) -> None:
    if _entries.get(key) is entry():
        _entries.pop(key, None)
