"""The topology that a layer owns: its index tensors, or, as long as only inference needs it, one bit per position."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from offpath.kernels import Backend
from offpath.ops.prepared import Prepared, prepare, remember
from offpath.pattern import Pattern


class Connections:
    """A pattern that only its owner can change: ops need not look whether it did.

    Copies the pattern. `crow_indices` and `col_indices` are for the ops alone; who writes into them gets wrong numbers.
    As long as nobody has asked for `col_indices`, `let_columns_go` keeps the bits of the pattern alone, from which they
    come back when somebody does. Copies and pickles are `Connections` of their own.

    >>> from offpath import pattern as patterns
    >>> connections = Connections(patterns.full((2, 3)))
    >>> x, values = torch.ones(1, 3), torch.arange(6.0)
    >>> torch.ops.offpath.sparse_linear(x, values, None, connections.crow_indices, connections.col_indices)
    tensor([[ 3., 12.]])
    """

    def __init__(self, pattern: Pattern) -> None:
        with torch.inference_mode(False):  # or the layer could never be trained
            own = Pattern(pattern.shape, pattern.crow_indices.clone(), pattern.col_indices.clone())
            # Other tensor objects over the same memory: what is remembered must not keep its own key alive.
            self.crow_indices = own.crow_indices.detach()
        self._prepared = Prepared(own)
        self._handed_out = False
        self._col_indices: Tensor | None = self._named_columns()

    @property
    def col_indices(self) -> Tensor:
        """The column of each connection, int32 [nnz]."""
        there = self._col_indices
        # While a compiler traces, the layer has handed them out before.
        if there is not None and (self._handed_out or torch.compiler.is_compiling()):
            return there
        return self.hand_out()

    def hand_out(self) -> Tensor:
        """`col_indices`, to be kept from now on: what somebody computes with them is remembered under them."""
        self._handed_out = True
        there = self._col_indices
        if there is None:
            # In a thread of its own: under the caller's modes, transforms and tracers it would be no plain tensor.
            with ThreadPoolExecutor(max_workers=1) as helper:
                there = self._col_indices = helper.submit(self._named_columns).result()
        return there

    def known(self, backend: Backend) -> Prepared:
        """What `prepare` knows of them; `col_indices` need not be there."""
        there = self._col_indices
        if there is None:
            return self._prepared
        return prepare(backend, self.crow_indices, there, self._prepared.shape)

    def let_columns_go(self, backend: Backend) -> None:
        """Keep the bits that `backend` has made of the pattern, if it has, in place of `col_indices` nobody has."""
        if not self._handed_out and self._col_indices is not None and self._prepared.matrix.let_columns_go(backend):
            self._col_indices = None

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
        """A copy of `col_indices`."""
        there = self._col_indices
        return self._prepared.matrix.find_columns() if there is None else there.clone()

    def are_those_of(self, pattern: Pattern) -> bool:
        """Whether `pattern` has the same connections, on the same device; never of what is on meta."""
        return (
            self._prepared.shape == pattern.shape
            and self.device == pattern.device
            and not self.is_meta
            and torch.equal(self.crow_indices, pattern.crow_indices)
            and torch.equal(self._prepared.matrix.find_columns(), pattern.col_indices)
        )

    def same_or_new(self, pattern: Pattern) -> Connections:
        """These connections, with all that was prepared from them, if they are those of `pattern` on its device."""
        return self if self.are_those_of(pattern) else Connections(pattern)

    def outdate(self) -> None:
        """Say that values no longer belong here: autograd refuses a backward pass of a graph from before."""
        there = self._col_indices
        if there is not None and not (there.is_meta or there.is_inference()):
            torch.autograd.graph.increment_version(there)

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
        together = torch.cat([self.crow_indices, self._prepared.matrix.find_columns()]).cpu().numpy().tobytes()
        return int.from_bytes(hashlib.blake2b(together, digest_size=8).digest(), "little", signed=True)

    def to(self, device: torch.device) -> Connections:
        """These connections on `device`: the same object when they are there already."""
        return self if self.device == device else Connections(self._as_they_are().to(device))

    def _as_they_are(self) -> Pattern:
        return Pattern(self._prepared.shape, self._prepared.crow_indices, self._prepared.matrix.find_columns())

    def _named_columns(self) -> Tensor:
        """The columns by a name of their own, under which ops find what is known of them."""
        with torch.inference_mode(False):
            columns = self._prepared.matrix.col_indices.detach()
        remember(columns, None, self._prepared)
        return columns

    def __reduce__(self) -> tuple[type[Connections], tuple[Pattern]]:
        # Not a copy: what is sent to another process through shared memory has to live until it has arrived.
        self.hand_out()
        return Connections, (self._as_they_are(),)

    def __deepcopy__(self, memo: dict) -> Connections:
        return Connections(self._as_they_are())
