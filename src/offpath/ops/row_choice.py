"""Whether a product on sparse rows is computed densely: rows that are nearly full gain nothing from being sparse.

An annealed k starts near all units. The break-even is measured on the machine, when rows are first so full that there
is a question.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from offpath.kernels import Backend
from offpath.kernels.row_calibration import break_evens

# Below this density nothing is measured: the sparse product wins (up to more than twice of it on the Zen 4 that the
# benchmarks name). Below this work, either takes microseconds.
SURELY_SPARSE, LITTLE_WORK = 0.08, 1 << 20
_forced: list[bool] = []


@contextmanager
def forced_dense_rows(dense: bool) -> Iterator[None]:
    """Compute all products on sparse rows densely, or none of them, everywhere in the process, inside the block.

    >>> with forced_dense_rows(False):
    ...     pass
    """
    _forced.append(dense)
    try:
        yield
    finally:
        _forced.pop()


def pays_densely(
    product: str, backend: Backend, dtype: torch.dtype, nnz: int, rows: int, columns: int, width: int
) -> bool:
    """Whether `product` is faster with the zeros of the rows written out."""
    if _forced:
        return _forced[-1]
    if not backend.native or nnz < SURELY_SPARSE * rows * columns or nnz * width < LITTLE_WORK:
        return False
    return nnz > break_evens(backend, dtype)[product] * rows * columns
