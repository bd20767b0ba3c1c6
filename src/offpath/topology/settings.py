"""What a setting must be: whole numbers where steps are counted, finite ones elsewhere, parts that can be called."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

from torch import Tensor


def whole(name: str, value: Any, hint: str = "pass an int, for example round(0.75 * steps)") -> int:
    """`value` as an int, whichever library's it is. Raises `ValueError` for anything else, whole floats included."""
    try:
        return int(operator.index(value))
    except TypeError:
        raise ValueError(f"expected {name} to be a whole number, got {value!r}; {hint}") from None


def keep_whole(part: Any, *names: str) -> None:
    """Make these settings of a frozen dataclass ints. Raises `ValueError` for one that is no whole number."""
    for name in names:
        # As ints and nothing else: a recipe describes itself by the repr of its settings.
        object.__setattr__(part, name, whole(name, getattr(part, name)))


def check_number(name: str, value: Any) -> None:
    """Raises `ValueError` unless `value` is a real number; NaN and inf are."""
    if not isinstance(value, Real):
        raise ValueError(f"expected {name} to be a number, got {value!r}")


def check_part(name: str, part: Any, example: str, *methods: str) -> None:
    """Raises `ValueError` unless `part` is no class and has all `methods`."""
    if isinstance(part, type):
        raise ValueError(
            f"expected {name} to be an instance, got the class {part.__name__}; write {part.__name__}(...)"
        )
    if not all(callable(getattr(part, method, None)) for method in methods):
        raise ValueError(f"expected {name} to be something like {example}, got {part!r}")


def in_words(value: Any) -> str:
    """What came, for a message: of a tensor its type and shape."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
