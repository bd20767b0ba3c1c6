"""Tables of what products cost, by a formula instead of a measurement."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product as combinations

from offpath.kernels.costs import BATCHES, DENSITIES, SMALL_SIZES, CostTable, Sizes
from offpath.kernels.methods import METHODS, PRODUCTS


def table_of(seconds_of: Callable[..., float], sizes: Sizes = SMALL_SIZES) -> CostTable:
    """A table whose entries `seconds_of(product, method, size, density, batch)` gives."""
    grid = list(combinations(sizes, DENSITIES, BATCHES))
    return CostTable(
        sizes, {p: {m: [seconds_of(p, m, *point) for point in grid] for m in METHODS[p]} for p in PRODUCTS}
    )
