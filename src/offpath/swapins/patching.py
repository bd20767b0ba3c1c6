"""Names in somebody else's modules and classes, replaced for a while."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any


class SwapInError(RuntimeError):
    """A package that is not as the swap-in knows it."""


_Replaced = tuple[Any, str, Any, Any]  # module or class, name, what stood there, what stands there
# What stood where offpath's replacements have been put, by id(module or class) and name.
_stood: dict[tuple[int, str], Any] = {}


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
            if vars(owner)[name] is ours:
                self._found.append((owner, name, _stood[id(owner), name], ours))
                continue
            theirs = _stood[id(owner), name] = vars(owner)[name]
            self._replaced.append((owner, name, theirs, ours))
            setattr(owner, name, ours)

    def undo(self) -> None:
        """Put back what stood there; a second time does nothing.

        Raises `SwapInError`, and puts nothing back, when somebody has replaced a name since.
        """
        self._put_back(self._found + self._replaced)

    def _put_back(self, replaced: list[_Replaced]) -> None:
        for owner, name, theirs, ours in replaced:
            if vars(owner)[name] not in (ours, theirs):
                raise SwapInError(
                    f"expected offpath's {_name(owner)}.{name}, found {vars(owner)[name]!r}: it was replaced after "
                    "patch(); undo that first"
                )
        for owner, name, theirs, _ in replaced:
            setattr(owner, name, theirs)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_back(self._replaced)

    def __repr__(self) -> str:
        names = [name for owner, name, _, ours in self._found + self._replaced if vars(owner)[name] is ours]
        return f"Patch({', '.join(names) or 'undone'})"


def _name(owner: Any) -> str:
    return str(getattr(owner, "__name__", type(owner).__name__))
