"""Watching what goes into and comes back out of a layer, in the steps that need it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from offpath.nn import SparseLinear


class Pass(NamedTuple):
    """What went into a layer, the gradient of what came out, and what the pass counts beside those of other steps."""

    x: Tensor
    dy: Tensor
    weight: float = 1.0


class Capture:
    """Keeps x and dy of every pass through one layer while it is armed.

    The tensors are those that autograd holds anyway, so that they cost memory only for as long as they are kept: from
    the backward pass to `topology.step()`. Those of earlier steps, the `history`, are copies.
    """

    def __init__(self, layer: SparseLinear) -> None:
        self._layer = layer
        self._hook = _Hook(layer)
        self.history: tuple[Pass, ...] = ()
        self._handle: RemovableHandle | None = None

    def arm(self) -> None:
        """Watch from now on."""
        if self._handle is None:
            self._handle = self._layer.register_forward_hook(self._hook, with_kwargs=True)

    def disarm(self) -> None:
        """Watch no more, and forget."""
        self.clear()
        self.history = ()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def clear(self) -> None:
        """Forget the passes since the last step; passes whose backward is still to come are forgotten as well."""
        self._hook.clear()

    def age(self, decay: float) -> None:
        """The passes since the last step become history, and all of it counts `decay` times what it did."""
        # Copies: whoever fed the layer may write the next batch over this one.
        new = (Pass(x.clone(), dy.clone(), weight) for x, dy, weight in self._hook.passes)
        self.history = tuple(Pass(x, dy, weight * decay) for x, dy, weight in (*self.history, *new))
        self.clear()

    def load(self, history: Iterable[tuple[Tensor, Tensor, float]]) -> None:
        """Go on from copies of a `history`."""
        device = self._layer.values.device
        self.history = tuple(Pass(x.to(device, copy=True), dy.to(device, copy=True), w) for x, dy, w in history)

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Every pass, in the order of the backward passes."""
        return (*self.history, *self._hook.passes)


class _Hook:
    """A forward hook that works on its own layer alone: copies and pickles of a model bring an idle one along."""

    def __init__(self, layer: SparseLinear | None = None) -> None:
        self._layer = weakref.ref(layer) if layer is not None else None
        self.passes: list[Pass] = []

    def clear(self) -> None:
        self.passes = []

    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        if self._layer is None or self._layer() is not layer or not y.requires_grad:
            return
        x, passes = (args[0] if args else kwargs["x"]).detach(), self.passes

        def keep(dy: Tensor) -> None:
            passes.append(Pass(x, dy.detach()))

        y.register_hook(keep)

    def __deepcopy__(self, memo: dict) -> _Hook:
        return _Hook()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()
