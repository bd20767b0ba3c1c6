"""How full a random pattern is."""

from __future__ import annotations

import math

DEFAULT_SPARSITY = 0.9


def density_of(sparsity: float | None, density: float | None) -> float:
    """The one of both that is given as a density; raises `ValueError` for what is none."""
    if density is not None:
        if not 0 < density <= 1:  # also refuses NaN
            raise ValueError(f"expected density in (0, 1], got {density}")
        return density
    sparsity = DEFAULT_SPARSITY if sparsity is None else sparsity
    if not (0 <= sparsity < 1) or math.isnan(sparsity):
        raise ValueError(f"expected sparsity in [0, 1), got {sparsity}; 0.9 keeps one connection in ten")
    return 1 - sparsity
