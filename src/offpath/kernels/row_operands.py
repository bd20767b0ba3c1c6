"""How sparse rows are refused that no native product may follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from offpath.kernels.operands import are_indices, contiguous, refuse, refuse_freed
from offpath.kernels.reference_rows import check_rows


def copied_or_refused_rows(
    product: Callable[..., bool],
    operands: Sequence[Any],
    crow_indices: Tensor,
    indices: Tensor,
    columns: int,
    named: Mapping[str, Tensor | None],
    **results: Tensor,
) -> None:
    """`copied_or_refused`, also of vectors, where the rows that `crow_indices` and `indices` describe may be wrong.

    Raises `KernelError` that says what they name beside `columns`, or else what is `named`, and the `results` if the
    caller was given them.
    """
    refuse_freed(crow_indices=crow_indices, indices=indices, **named)
    if product(*contiguous(operands, (crow_indices, indices, *named.values()), 1, results.values())):
        return
    if not are_indices(crow_indices.contiguous(), indices.contiguous()):
        refuse(crow_indices=crow_indices, indices=indices)
    check_rows(crow_indices, indices, columns)
    refuse(**named, **results)
