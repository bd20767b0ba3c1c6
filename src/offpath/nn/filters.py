"""`filter_fn`, which says of a module and its name whether it is meant."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

FilterFn = Callable[[nn.Module, str], bool]


def check_filter(filter_fn: object) -> None:
    """Raises `ValueError` for what is neither None nor a function."""
    if filter_fn is not None and not callable(filter_fn):
        raise ValueError(
            f"expected filter_fn to be a function of (module, name), got {type(filter_fn).__name__} {filter_fn!r:.60}; "
            "by their names: filter_fn=lambda module, name: name in names"
        )
