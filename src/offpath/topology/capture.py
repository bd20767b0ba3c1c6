"""Watching what goes into and comes back out of a layer, in the one step that needs it."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from offpath.nn import SparseLinear


class Capture:
    """Keeps x and dy of every pass through one layer while it is armed.

    The tensors are those that autograd holds anyway, so that they cost memory only for as long as they are kept: from
    the backward pass to `topology.step()`.
    """

    def __init__(self, layer: SparseLinear) -> None:
        self._layer = layer
        self._hook = _Hook(layer)
        self._handle: RemovableHandle | None = None

    def arm(self) -> None:
        """Watch from now on."""
        if self._handle is None:
            self._handle = self._layer.register_forward_hook(self._hook, with_kwargs=True)

    def disarm(self) -> None:
        """Watch no more, and forget."""
        self.clear()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def clear(self) -> None:
        """Forget the passes; passes whose backward is still to come are forgotten as well."""
        self._hook.clear()

    @property
    def passes(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(x, dy) of each pass, in the order of the backward passes."""
        return tuple(self._hook.passes)


class _Hook:
    """A forward hook that works on its own layer alone: copies and pickles of a model bring an idle one along."""

    def __init__(self, layer: SparseLinear | None = None) -> None:
        self._layer = weakref.ref(layer) if layer is not None else None
        self.passes: list[tuple[Tensor, Tensor]] = []

    def clear(self) -> None:
        self.passes = []

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        if self._layer is None or self._layer() is not layer or not y.requires_grad:
            return
        x, passes = (args[0] if args else kwargs["x"]).detach(), self.passes

        def keep(dy: Tensor) -> None:
            passes.append((x, dy.detach()))

        y.register_hook(keep)

    def __deepcopy__(self, memo: dict) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()
