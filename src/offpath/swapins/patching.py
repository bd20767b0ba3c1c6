"""Names in somebody else's modules and classes, replaced for a while."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any


class SwapInError(RuntimeError):
    """A package that is not as the swap-in knows it."""


@dataclass(frozen=True, eq=False)
class _Replacement:
    """`ours` in the place of `theirs`, under the `name` of a module or class."""

    owner: Any
    name: str
    theirs: Any
    ours: Any


# What has not been put back. A patch that finds its own replacement there shares it.
_in_place: list[_Replacement] = []


class Patch:
    """Replacements that are in place until `undo()`, or until the end of a `with` block.

    Each is (module or class, name, what stands there from now on). A name that already has its replacement is left
    alone, so switching on twice is switching on once: `undo()` of either patch switches it off, the end of a `with`
    block only what that block has switched on. Raises `SwapInError`, and replaces nothing, when a name does not exist.

    >>> import types
    >>> module = types.SimpleNamespace(double=lambda x: 2 * x)
    >>> with Patch([(module, "double", lambda x: x + x)]) as patch:
    ...     patch
    Patch(double)
    >>> patch
    Patch(undone)
    """

    def __init__(self, replacements: Iterable[tuple[Any, str, Any]]) -> None:
        replacements = list(replacements)
        for owner, name, _ in replacements:
            if name not in vars(owner):
                raise SwapInError(
                    f"expected {_name(owner)}.{name} to replace, found none: offpath does not know this version of the "
                    "package; install the one that the extra names, or report the version"
                )
        self._made: list[_Replacement] = []
        self._found: list[_Replacement] = []
        for owner, name, ours in replacements:
            there = [one for one in _in_place if one.owner is owner and one.name == name and one.ours is ours]
            if vars(owner)[name] is ours:
                self._found += there
                continue
            for taken_away in there:
                _in_place.remove(taken_away)
            self._made.append(_Replacement(owner, name, vars(owner)[name], ours))
            _in_place.append(self._made[-1])
            setattr(owner, name, ours)

    def undo(self) -> None:
        """Put back what stood there; a second time does nothing.

        Raises `SwapInError`, and puts nothing back, when somebody has replaced a name since.
        """
        _put_back(self._found + self._made)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _put_back(self._made)

    def __repr__(self) -> str:
        names = [one.name for one in self._found + self._made if one in _in_place]
        return f"Patch({', '.join(names) or 'undone'})"


def _put_back(replacements: list[_Replacement]) -> None:
    left = [one for one in replacements if one in _in_place]
    for one in left:
        found = vars(one.owner)[one.name]
        if found is not one.ours:
            raise SwapInError(
                f"expected offpath's {_name(one.owner)}.{one.name}, found {found!r}: it was replaced after patch(); "
                "undo that first"
            )
    for one in left:
        setattr(one.owner, one.name, one.theirs)
        _in_place.remove(one)


def _name(owner: Any) -> str:
    return str(getattr(owner, "__name__", type(owner).__name__))
