"""How many connections each layer drops and grows in an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from offpath.topology.distribution import DISTRIBUTIONS, layer_densities
from offpath.topology.errors import TopologyError
from offpath.topology.layer import LayerView
from offpath.topology.quotas import Quota, droppable
from offpath.topology.schedules import Cubic, DropFraction
from offpath.topology.select import lowest
from offpath.topology.settings import check_number, check_part


class Budget(Protocol):
    """Shares the connections over the layers.

    One with an attribute `keeps_nnz = True` leaves every layer its number: only the others need, in many processes, a
    `DistributedDataParallel` that can be laid out anew.
    """

    def check(self, layers: Sequence[LayerView]) -> None:
        """Raise `TopologyError` when no update can ever be made of such layers."""

    def __call__(self, step: int, layers: Sequence[LayerView], importances: Sequence[Tensor]) -> list[Quota]:
        """The quota of each layer at `step`; `importances` are what the drop rule said, in the order of the layers."""


@dataclass(frozen=True)
class PerLayer:
    """Each layer drops its own share `drop_fraction(step)` and grows as many: its count stays.

    A layer drops no more than it has free places to grow at, so a full one stays as it is.
    """

    keeps_nnz: ClassVar[bool] = True
    drop_fraction: DropFraction

    def __post_init__(self) -> None:
        check_part("drop_fraction", self.drop_fraction, "Constant(0.3)", "__call__")

    def check(self, layers: Sequence[LayerView]) -> None:
        _check_room(layers)

    def __call__(self, step: int, layers: Sequence[LayerView], importances: Sequence[Tensor]) -> list[Quota]:
        quotas = []
        for layer, importance in zip(layers, importances, strict=True):
            count = min(round(_fraction(self.drop_fraction, step) * layer.nnz), droppable(importance), layer.free_count)
            quotas.append(Quota(count, count))
        return quotas


@dataclass(frozen=True)
class Redistribute:
    """The least important connections of all layers go, `drop_fraction(step)` of all; the total stays.

    Each layer grows in proportion to the connections that survived in it (Mostafa & Wang, 2019); what it has no room
    for goes to the others.
    """

    drop_fraction: DropFraction

    def __post_init__(self) -> None:
        check_part("drop_fraction", self.drop_fraction, "Constant(0.3)", "__call__")

    def check(self, layers: Sequence[LayerView]) -> None:
        _check_room(layers)

    def __call__(self, step: int, layers: Sequence[LayerView], importances: Sequence[Tensor]) -> list[Quota]:
        room = [layer.free_count for layer in layers]
        total = round(_fraction(self.drop_fraction, step) * sum(layer.nnz for layer in layers))
        total = min(total, sum(room), sum(map(droppable, importances)))
        drops = _lowest_of_all(importances, total)
        survivors = [layer.nnz - drop for layer, drop in zip(layers, drops, strict=True)]
        grows = share(total, survivors, room)
        return [Quota(drop, grow) for drop, grow in zip(drops, grows, strict=True)]


@dataclass(frozen=True)
class Shrink:
    """From the connections at the start down to `final_sparsity`, with a share `remaining(step)` of the way to go.

    `distribution` "uniform" and "erk" say what each layer has at the end; "global" ranks the importance over all
    layers.
    """

    final_sparsity: float
    remaining: Cubic
    distribution: str = "uniform"

    def __post_init__(self) -> None:
        if self.distribution not in (*DISTRIBUTIONS, "global"):
            raise ValueError(
                f"expected distribution to be one of {', '.join(DISTRIBUTIONS)}, global; got {self.distribution!r}"
            )
        check_number("final_sparsity", self.final_sparsity)
        check_part("remaining", self.remaining, "Cubic(end_step=1000)", "__call__")
        if not 0 < self.final_sparsity < 1:
            raise ValueError(f"expected final_sparsity in (0, 1), got {self.final_sparsity}")

    def check(self, layers: Sequence[LayerView]) -> None:
        targets = self._targets(layers, 0.0)
        if self.distribution == "global":
            begin = sum(layer.initial_nnz for layer in layers)
            if targets[0] > begin:
                size = sum(layer.size for layer in layers)
                raise TopologyError(_below_the_start("the model", self.final_sparsity, 1 - begin / size))
            return
        for layer, target in zip(layers, targets, strict=True):
            if target > layer.initial_nnz:
                final, begin_sparsity = 1 - target / layer.size, 1 - layer.initial_nnz / layer.size
                raise TopologyError(_below_the_start(f"layer {layer.name!r}", final, begin_sparsity))
            if target == 0 and layer.initial_nnz:
                raise TopologyError(
                    f"layer {layer.name!r}: expected a connection to stay, but at a final sparsity of "
                    f"{self.final_sparsity} none of its {layer.size} positions would"
                )

    def __call__(self, step: int, layers: Sequence[LayerView], importances: Sequence[Tensor]) -> list[Quota]:
        targets = self._targets(layers, self.remaining(step))
        if self.distribution == "global":
            surplus = sum(layer.nnz for layer in layers) - targets[0]
            drops = _lowest_of_all(importances, max(0, min(surplus, sum(map(droppable, importances)))))
            return [Quota(drop, 0) for drop in drops]
        return [
            Quota(max(0, min(layer.nnz - target, droppable(importance))), 0)
            for layer, target, importance in zip(layers, targets, importances, strict=True)
        ]

    def _targets(self, layers: Sequence[LayerView], remaining: float) -> list[int]:
        """Connections when a share `remaining` of the way is left, of each layer, or of all in one number."""
        sizes, begins = [layer.size for layer in layers], [layer.initial_nnz for layer in layers]
        if self.distribution == "global":
            sizes, begins, densities = [sum(sizes)], [sum(begins)], [1 - self.final_sparsity]
        else:
            densities = layer_densities(
                [layer.pattern.shape for layer in layers], self.final_sparsity, self.distribution
            )
        targets = []
        for size, begin, density in zip(sizes, begins, densities, strict=True):
            final, initial = 1 - density, 1 - begin / max(size, 1)
            targets.append(round((1 - (final + (initial - final) * remaining)) * size))
        return targets


def share(total: int, weights: Sequence[int], room: Sequence[int]) -> list[int]:
    """`total` in whole numbers, in proportion to `weights`, at most `room` each; the largest remainders round up.

    What does not fit goes to the others in the same proportion, or evenly where those have weight zero.

    >>> share(10, weights=[3, 1, 1], room=[4, 9, 9])
    [4, 3, 3]
    """
    shares = [0] * len(weights)
    while (rest := total - sum(shares)) > 0:
        open_to_more = [i for i in range(len(weights)) if shares[i] < room[i]]
        if not open_to_more:
            raise TopologyError(f"expected room for {total} connections, but there is room for {sum(room)}")
        weight = sum(weights[i] for i in open_to_more)
        # In whole numbers throughout: every process and machine must come to the same shares.
        exact = {i: rest * weights[i] for i in open_to_more} if weight else dict.fromkeys(open_to_more, 0)
        floors = {i: exact[i] // max(weight, 1) for i in open_to_more}
        by_remainder = sorted(open_to_more, key=lambda i: (-(exact[i] % max(weight, 1)), i))
        for i in by_remainder[: rest - sum(floors.values())]:
            floors[i] += 1
        for i in open_to_more:
            shares[i] = min(shares[i] + floors[i], room[i])
    return shares


def _lowest_of_all(importances: Sequence[Tensor], count: int) -> list[int]:
    """How many of the `count` lowest of all are in each layer; among equals, those of earlier layers."""
    together = torch.cat([importance.double() for importance in importances])
    chosen = lowest(together, count)
    ends = torch.tensor([importance.numel() for importance in importances], device=chosen.device).cumsum(0)
    return torch.searchsorted(chosen, ends).diff(prepend=ends.new_zeros(1)).tolist()


def _fraction(schedule: DropFraction, step: int) -> float:
    fraction = schedule(step)
    if not isinstance(fraction, Real) or not 0 <= fraction <= 1:
        raise TopologyError(
            f"expected a drop_fraction in [0, 1] at step {step}, got {fraction!r} from {type(schedule).__name__}"
        )
    return float(fraction)


def _check_room(layers: Sequence[LayerView]) -> None:
    if not any(layer.free_count and layer.nnz for layer in layers):
        raise TopologyError(
            "expected a layer with connections to drop and free positions to grow at, but all are full or empty; make "
            "the model sparse first, for example with offpath.sparsify(model, 0.9)"
        )


def _below_the_start(what: str, final: float, begin: float) -> str:
    return (
        f"{what}: expected a final sparsity of at least {begin:.4g}, where it starts, got {final:.4g}; pruning never "
        "adds connections"
    )
