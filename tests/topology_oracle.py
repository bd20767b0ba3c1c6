"""What a topology does, written over dense weights and masks: what the package answers to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from offpath import SparseLinear, pattern as patterns
from offpath.topology import Topology

# drop(weight, gradient, mask) -> importance of all positions; grow(weight gradient, free positions, count) -> positions.
Drop = Callable[[Tensor, Tensor, Tensor], Tensor]
Grow = Callable[[Tensor, Tensor, int], Tensor]


def dense_update(weight: Tensor, mask: Tensor, drop: Tensor, count: int, grow: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The new mask: the `count` lowest of `drop` inside `mask` go, as many of `grow(free positions, count)` come."""
    connections = mask.flatten().nonzero().squeeze(1)
    order = torch.sort(drop.flatten()[connections], stable=True).indices
    free = (~mask).flatten().nonzero().squeeze(1)
    new = mask.flatten().clone()
    new[connections[order[:count]]] = False
    new[grow(free, count)] = True
    return new.view_as(mask)


def random_growth(generator: torch.Generator) -> Callable[[Tensor, int], Tensor]:
    return lambda free, count: free[patterns.distinct(len(free), count, generator)]


def gradient_growth(gradient: Tensor) -> Callable[[Tensor, int], Tensor]:
    scores = gradient.abs().flatten()
    return lambda free, count: free[torch.sort(scores[free], descending=True, stable=True).indices[:count]]


def no_growth(free: Tensor, count: int) -> Tensor:
    return free[:0]


class DenseTwin:
    """Dense layers with the numbers of sparse ones; weights outside the masks and their momenta are held at zero."""

    def __init__(self, model: nn.Module) -> None:
        self.sparse = [m for m in model.modules() if isinstance(m, SparseLinear)]
        self.layers = [layer.to_dense() for layer in self.sparse]
        self.masks = [layer.pattern.to_mask() for layer in self.sparse]

    def set_masks(self, masks: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
        for layer, old, new in zip(self.layers, self.masks, masks, strict=True):
            for tensor in (layer.weight.data, *_moments(optimizer, layer.weight)):
                tensor *= new & old  # the dropped go, and the grown begin with zero
        self.masks = masks

    def mask_gradients(self) -> list[Tensor]:
        """Mask the gradients; returns what they were."""
        whole = [layer.weight.grad.clone() for layer in self.layers]
        for layer, mask in zip(self.layers, self.masks, strict=True):
            layer.weight.grad *= mask
        return whole

    def assert_same_topology(self) -> None:
        for layer, mask in zip(self.sparse, self.masks, strict=True):
            assert torch.equal(layer.pattern.to_mask(), mask)


def _moments(optimizer: torch.optim.Optimizer, weight: Tensor) -> list[Tensor]:
    return [t for t in optimizer.state[weight].values() if isinstance(t, Tensor) and t.shape == weight.shape]


def fraction(topology: Topology, step: int) -> float:
    return topology.recipe.budget.drop_fraction(step)
