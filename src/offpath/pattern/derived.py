"""What was already found out about a pair of index tensors, kept for as long as they live.

A layer's state is its index tensors; `Pattern` objects are cheap views that come and go. Checking and transposing
cost O(nnz), so their results hang on the tensors themselves, by weak reference: nothing is kept alive, and a tensor
that was modified in place is examined anew. The look-up stands in every call of an op, hence the plain dict (a
`WeakTensorKeyDictionary` takes four times as long).
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor


class Derived:
    """Facts about one (crow_indices, col_indices, shape): checked or not, the transpose, plans of backends."""

    __slots__ = ("__weakref__", "checked", "col_indices", "crow_indices", "plans", "shape", "transpose", "versions")

    def __init__(self, crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int]) -> None:
        self.crow_indices = weakref.ref(crow_indices)
        self.col_indices = col_indices
        self.shape = shape
        self.versions = _versions(crow_indices, col_indices)
        self.checked = False
        self.transpose: Any = None
        self.plans: dict[str, Any] = {}

    def still_describes(self, crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int]) -> bool:
        """Whether these are the same tensors, unmodified since."""
        return (
            self.crow_indices() is crow_indices
            and self.col_indices is col_indices
            and self.shape == shape
            and (self.versions is None or self.versions == (crow_indices._version, col_indices._version))
        )


# Keyed by id(crow_indices). An id can be reused once its tensor has died, so a hit counts only if the weak
# reference still leads to the tensor that was asked about.
_by_id: dict[int, Derived] = {}


def derived_for(crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int]) -> Derived:
    """The facts kept for these very tensors, fresh when they are new or were modified in place."""
    key = id(crow_indices)
    found = _by_id.get(key)
    if found is not None and found.still_describes(crow_indices, col_indices, shape):
        return found
    fresh = Derived(crow_indices, col_indices, shape)
    _by_id[key] = fresh
    weakref.finalize(crow_indices, _forget, key, weakref.ref(fresh)).atexit = False
    return fresh


def _forget(key: int, entry: weakref.ref[Derived]) -> None:
    if _by_id.get(key) is entry():
        _by_id.pop(key, None)


def _versions(crow_indices: Tensor, col_indices: Tensor) -> tuple[int, int] | None:
    # Inference tensors keep no version counter; outside inference mode they cannot be modified in place.
    if crow_indices.is_inference() or col_indices.is_inference():
        return None
    return crow_indices._version, col_indices._version
