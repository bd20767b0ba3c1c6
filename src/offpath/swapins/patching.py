"""Names in somebody else's modules and classes, replaced for a while."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any


class SwapInError(RuntimeError):
    """A package that is not as the swap-in knows it."""


class Patch:
    """Replacements that are in place until `undo()`, or until the end of a `with` block.

    Each is (module or class, name, what stands there from now on). A name that already has its replacement is left
    alone, so switching on twice is switching on once, and the first patch undoes it. Raises `SwapInError`, and replaces
    nothing, when a name does not exist.

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
        self._replaced = []
        for owner, name, ours in replacements:
            if vars(owner)[name] is not ours:
                self._replaced.append((owner, name, vars(owner)[name], ours))
                setattr(owner, name, ours)

    def undo(self) -> None:
        """Put back what stood there; a second time does nothing.

        Raises `SwapInError`, and puts nothing back, when somebody has replaced a name since.
        """
        for owner, name, _, ours in self._replaced:
            if vars(owner)[name] is not ours:
                raise SwapInError(
                    f"expected offpath's {_name(owner)}.{name}, found {vars(owner)[name]!r}: it was replaced after "
                    "patch(); undo that first"
                )
        for owner, name, theirs, _ in self._replaced:
            setattr(owner, name, theirs)
        self._replaced = []

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Patch({', '.join(name for _, name, _, _ in self._replaced) or 'undone'})"


def _name(owner: Any) -> str:
    return str(getattr(owner, "__name__", type(owner).__name__))
