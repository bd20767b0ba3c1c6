"""Whether a product on sparse rows is computed with their zeros written out.

Rows that are nearly full gain nothing from being sparse (an annealed k starts near all units), and many rows together
meet a sparse weight so often that its whole is read faster in order. What decides is measured on the machine, when
there is first a question.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from offpath.kernels import Backend
from offpath.kernels.calibration import cost_table
from offpath.kernels.costs import sizes_for
from offpath.kernels.methods import METHODS
from offpath.kernels.operands import on_device_of
from offpath.kernels.row_calibration import break_even
from offpath.kernels.visit_calibration import OVER_ALL_CONNECTIONS, seconds_per_visit

# Below this density nothing is measured: the sparse product wins (up to more than twice of it on the Zen 4 that the
# benchmarks name). Below this work, either takes microseconds.
SURELY_SPARSE, LITTLE_WORK = 0.08, 1 << 20
# What writing the zeros out takes beside a product over all connections, and what both predictions are off by.
OVER_ALL_MARGIN = 1.15
# The calls that find the nonzeros of the smallest input.
FINDING_SECONDS = 20e-6
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


def pays_densely(product: str, backend: Backend, like: Tensor, nnz: int, rows: int, columns: int, width: int) -> bool:
    """Whether `product` is faster with the zeros of the rows written out, in the dtype and on the device of `like`."""
    if _forced:
        return _forced[-1]
    if backend.costs is not None:
        with on_device_of(like):
            sparse, dense = backend.costs.rows(product, nnz, rows, columns, width, like.dtype)
        return dense * OVER_ALL_MARGIN < sparse
    if not backend.native or nnz < SURELY_SPARSE * rows * columns or nnz * width < LITTLE_WORK:
        return False
    return nnz > break_even(backend, like.dtype, product, columns * width) * rows * columns


def pays_over_all_connections(
    product: str, backend: Backend, dtype: torch.dtype, nnz: int, rows: int, weight_nnz: int, shape: tuple[int, int]
) -> bool:
    """Whether `product` with a sparse weight of `shape` (in, out) is faster as that of `SparseLinear` on dense rows."""
    if _forced:
        return _forced[-1]
    visits = nnz * weight_nnz / max(1, shape[0])
    if not backend.native or rows == 1 or visits < LITTLE_WORK:
        return False
    over_all = _seconds_over_all(OVER_ALL_CONNECTIONS[product], backend, dtype, rows, weight_nnz, shape)
    return OVER_ALL_MARGIN * over_all < visits * seconds_per_visit(backend, dtype)[product]


def finding_pays(x: Tensor, backend: Backend, weight_nnz: int, shape: tuple[int, int]) -> bool:
    """Whether to look for the nonzeros of a dense `x` [rows, in], in place of a product with all of it."""
    if _forced:
        return not _forced[-1]
    if not backend.native:
        return True
    over_all = _seconds_over_all("dx", backend, x.dtype, x.shape[0], weight_nnz, shape)
    seconds = seconds_per_visit(backend, x.dtype)
    found = FINDING_SECONDS + x.numel() * seconds["finding"]
    if found >= over_all:
        return False
    visits = int(x.count_nonzero()) * weight_nnz / max(1, shape[0])
    return found + visits * seconds["sparse_matmul"] < over_all


@lru_cache(maxsize=256)
def _seconds_over_all(
    product: str, backend: Backend, dtype: torch.dtype, batch: int, nnz: int, shape: tuple[int, int]
) -> float:
    table = cost_table(backend, dtype, sizes_for(*shape))
    return min(table.predict(product, method, *shape, nnz, batch) for method in METHODS[product])
