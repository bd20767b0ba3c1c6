"""What the callbacks share: a topology that takes its step whenever its optimizer has taken one."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import distributed, nn
from torch.optim import Optimizer

from offpath.topology import Topology, TopologyUpdate

MakeTopology = Callable[[nn.Module, Optimizer], Topology]


class _Uncompiled:
    """The process's compiled models, run uncompiled as long as any follower's topology watches their passes."""

    def __init__(self) -> None:
        self._watchers: set[int] = set()
        self._stance: Any = None

    def set_watching(self, watcher: int, watching: bool) -> None:
        (self._watchers.add if watching else self._watchers.discard)(watcher)
        if self._watchers and self._stance is None:
            self._stance = torch.compiler.set_stance("force_eager")
        elif not self._watchers and self._stance is not None:
            self._stance.__exit__(None, None, None)  # to what it was
            self._stance = None


_uncompiled = _Uncompiled()


class Follower:
    """Calls `topology.step()` after each step that `optimizer` really makes.

    A hook of the optimizer's own says when: gradient accumulation, clipping, and whoever calls the optimizer make no
    difference, and the gradients are still there. What was seen of a step that a gradient scaler skips is forgotten.
    Compiled models run uncompiled in the steps that the topology watches: they would not notice it.

    >>> import torch
    >>> from offpath import SET, SparseLinear
    >>> layer = SparseLinear(64, 32)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> follower = Follower(SET(layer, optimizer, update_freq=2), optimizer)
    >>> for _ in range(2):
    ...     layer(torch.randn(8, 64)).square().sum().backward()
    ...     optimizer.step()
    >>> [(update.step, update.grown) for update in follower.take_updates()]
    [(2, 62)]
    """

    def __init__(self, topology: Topology, optimizer: Optimizer) -> None:
        self.topology = topology
        self._updates: list[TopologyUpdate] = []
        self._announced = False
        self._handle = optimizer.register_step_post_hook(self._after_step)
        # A training that fails leaves its follower to the garbage collector.
        weakref.finalize(self, _uncompiled.set_watching, id(self), watching=False).atexit = False
        _uncompiled.set_watching(id(self), topology.watching)

    def state_dict(self) -> dict[str, Any]:
        """The topology's state, as one process saves it for all; warns where the others could not go on from it."""
        state = self.topology.state_dict()
        many = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        if many and any("history" in layer for layer in state["layers"].values()):
            warnings.warn(
                "this checkpoint cannot be resumed in many processes: it was saved between two updates of a rule that "
                "looks at several steps, and holds what one process has seen of them; save right after an update, for "
                "example every update_freq steps",
                stacklevel=2,
            )
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a topology's `state`. Raises `TopologyError` for one that does not fit."""
        self.topology.load_state_dict(state)
        _uncompiled.set_watching(id(self), self.topology.watching)

    def announce(self) -> None:
        """Say that the trainer is about to ask for a step; if none has come until `take_updates`, it was skipped."""
        self._announced = True

    def take_updates(self) -> list[TopologyUpdate]:
        """The updates since the last call."""
        if self._announced:
            self.topology.forget()
            self._announced = False
        updates, self._updates = self._updates, []
        return updates

    def remove(self) -> None:
        """Follow no more, and watch no more passes."""
        self._handle.remove()
        self.topology.close()
        _uncompiled.set_watching(id(self), watching=False)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Fused optimizers are called in skipped steps as well, and find out by this tensor of the scaler's.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        self._announced = False
        update = self.topology.step()
        _uncompiled.set_watching(id(self), self.topology.watching)
        if update is not None:
            self._updates.append(update)


def statistics(update: TopologyUpdate) -> dict[str, float]:
    """An update as a logger takes it: of all layers together, and the sparsity of each."""
    together = {"dropped": update.dropped, "grown": update.grown, "sparsity": update.sparsity}
    moved = {"moved_share": 1 - update.unmoved / max(update.nnz, 1)}
    layers = {f"sparsity/{layer.name}": layer.sparsity for layer in update.layers}
    return {f"topology/{name}": value for name, value in (together | moved | layers).items()}
