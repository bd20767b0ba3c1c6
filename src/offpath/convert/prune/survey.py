"""What one pass over the calibration data tells: which layers are called, in which order, on the same inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

from torch import Tensor, nn

from offpath.convert.prune.inputs import geometry
from offpath.convert.prune.layer import Layer


@dataclass
class Calls:
    """The calls of one layer. Calls on the same tensor, one after the other, have the same number in `inputs`."""

    inputs: list[int] = field(default_factory=list)
    first: dict[int, int] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)


class Survey:
    """Notes calls while the model runs; `groups` says afterwards what to prune together."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.calls = {layer: Calls() for layer in layers}
        self.batches = 0
        self._time = 0
        self._number = -1
        self._latest: tuple[Tensor, int] | None = None

    def next_batch(self) -> None:
        """A batch begins."""
        self.batches += 1
        self._latest = None

    def end(self) -> None:
        """The pass is over: its last input need not be held any more."""
        self._latest = None

    def note(self, layer: Layer, x: Tensor) -> None:
        """A layer is fed `x`."""
        # A tensor of inference mode counts no writes: each call may be fed something else.
        version = None if x.is_inference() else x._version
        # The tensor is held, so that no other can take its place in memory.
        if version is None or self._latest is None or self._latest[0] is not x or self._latest[1] != version:
            self._latest = None if version is None else (x, version)
            self._number += 1
        calls = self.calls[layer]
        calls.inputs.append(self._number)
        calls.first.setdefault(self.batches, self._time)
        calls.last[self.batches] = self._time
        self._time += 1

    def called(self) -> list[Layer]:
        """The layers that were called, in the order of their first calls."""
        return sorted((layer for layer, calls in self.calls.items() if calls.inputs), key=self._first_call)

    def _first_call(self, layer: Layer) -> tuple[int, int]:
        return next(iter(self.calls[layer].first.items()))

    def twins(self, layers: list[Layer]) -> list[list[Layer]]:
        """`layers` in lists of those that always read the same inputs, such as query, key and value."""
        found: dict[object, list[Layer]] = {}
        for layer in layers:
            key = (tuple(self.calls[layer].inputs), geometry(layer.module))
            found.setdefault(key, []).append(layer)
        return list(found.values())

    def after(self, group: list[Layer]) -> Layer | None:
        """A layer that is only called when all calls of `group` are over, in each batch; the earliest one."""
        batches = range(1, self.batches + 1)
        ends = [max(self.calls[layer].last.get(batch, -1) for layer in group) for batch in batches]
        for layer in self.called():
            first = self.calls[layer].first
            if all(first.get(batch, inf) > end for batch, end in zip(batches, ends, strict=True)):
                return layer
        return None


def block_names(model: nn.Module, layers: list[Layer]) -> dict[Layer, str]:
    """The block that each layer is in: the smallest of a list of alike modules with two layers or more, or itself."""
    containers = (nn.ModuleList, nn.Sequential)
    owners = {}
    chosen = {layer.module: layer for layer in layers}
    for name, container in model.named_modules():  # outer ones first, so that inner ones have the last word
        children = list(container.children())
        if isinstance(container, containers) and len(children) > 1 and len({type(child) for child in children}) == 1:
            for key, child in container.named_children():
                inside = [chosen[module] for module in child.modules() if module in chosen]
                if len(inside) > 1:
                    owners.update(dict.fromkeys(inside, f"{name}.{key}"))
    return {layer: owners.get(layer, layer.name) for layer in layers}
