"""What the modules that choose live units share: [..., n] becomes rows, and rows become what the caller wants."""

from __future__ import annotations

import math
import operator
from contextlib import suppress
from typing import Any

from torch import Tensor

from offpath.ops import SparseRows
from offpath.ops.selection import to_dense

OUTPUTS = ("rows", "dense")


def check_output(output: str) -> str:
    """Raises `ValueError` unless `output` is one that `as_output` makes."""
    if output not in OUTPUTS:
        raise ValueError(f"expected output to be 'rows' (SparseRows) or 'dense' (a tensor), got {output!r}")
    return output


def check_k(k: Any, least: int = 0, most: int | None = None) -> int:
    """`k` as an int. Raises `ValueError` unless it can be a number of units."""
    if not isinstance(k, int):
        with suppress(TypeError):
            k = operator.index(k)  # a whole number of another library
    if not isinstance(k, int) or isinstance(k, bool) or k < least or (most is not None and k > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"expected k to be an int {wanted}, got {k!r}; round what a schedule computes")
    return k


def flatten(x: Tensor, n: int | None = None) -> Tensor:
    """[..., n] as [rows, n]. Raises `ValueError` for a scalar, and for other than n units where n is given."""
    if x.dim() == 0 or (n is not None and x.shape[-1] != n):
        raise ValueError(f"expected [..., {'units' if n is None else n}], got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"expected units of a floating dtype, got {x.dtype}; convert them by x.float()")
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def as_output(rows: SparseRows, like: Tensor, output: str) -> SparseRows | Tensor:
    """The rows themselves, or a dense tensor of the shape of `like`. Their indices must be in range."""
    if output == "rows":
        return rows
    return to_dense(rows.crow_indices, rows.indices, rows.values, rows.columns).view(like.shape)
