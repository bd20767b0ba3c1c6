"""Names in somebody else's modules and classes, replaced for a while."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any


class SwapInError(RuntimeError):
    """A package that is not as the swap-in knows it."""


_Replaced = tuple[Any, str, Any, Any]  # module or class, name, what stood there, what stands there
# What is in place, by id(module or class), name and id(replacement). A patch that finds it there shares it.
_in_place: dict[tuple[int, str, int], _Replaced] = {}


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
        self._replaced: list[_Replaced] = []
        self._found: list[_Replaced] = []
        for owner, name, ours in replacements:
            one = (owner, name, vars(owner)[name], ours)
            if vars(owner)[name] is not ours:
                _in_place[_key(one)] = one
                self._replaced.append(one)
                setattr(owner, name, ours)
            elif there := _in_place.get(_key(one)):
                self._found.append(there)

    def undo(self) -> None:
        """Put back what stood there; a second time does nothing.

        Raises `SwapInError`, and puts nothing back, when somebody has replaced a name since.
        """
        self._put_back(self._found + self._replaced)

    def _put_back(self, replaced: list[_Replaced]) -> None:
        left = [one for one in replaced if _in_place.get(_key(one)) is one]  # the others were put back before
        for owner, name, _, ours in left:
            if vars(owner)[name] is not ours:
                raise SwapInError(
                    f"expected offpath's {_name(owner)}.{name}, found {vars(owner)[name]!r}: it was replaced after "
                    "patch(); undo that first"
                )
        for one in left:
            owner, name, theirs, _ = one
            setattr(owner, name, theirs)
            del _in_place[_key(one)]

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_back(self._replaced)

    def __repr__(self) -> str:
        names = [one[1] for one in self._found + self._replaced if _in_place.get(_key(one)) is one]
        return f"Patch({', '.join(names) or 'undone'})"


def _key(one: _Replaced) -> tuple[int, str, int]:
    owner, name, _, ours = one
    return id(owner), name, id(ours)


def _name(owner: Any) -> str:
    return str(getattr(owner, "__name__", type(owner).__name__))
