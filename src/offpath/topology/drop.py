"""What to drop: a rule gives every connection an importance, and the least important go first.

A drop rule is any callable `rule(layer: LayerView) -> Tensor` [nnz], floating. An importance of inf says never. It may
be a function, or a frozen dataclass where it has settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from offpath.topology.layer import LayerView
from offpath.topology.settings import check_number

DropRule = Callable[[LayerView], Tensor]


def magnitude(layer: LayerView) -> Tensor:
    """|w|."""
    return layer.values.abs()


def random(layer: LayerView) -> Tensor:
    """Every connection is as likely to go as any other."""
    # In float64, so that ties, which would favour high slots, do not occur in practice.
    draw = torch.rand(layer.nnz, generator=layer.generator, dtype=torch.float64, device="cpu")
    return draw.to(layer.values.device)


@dataclass(frozen=True)
class Threshold:
    """Only weights of |w| < `threshold`, the smallest first.

    Mostafa & Wang, "Parameter Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
    Reparameterization", 2019, with a threshold that stays.
    """

    threshold: float

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)
        if not 0 < self.threshold < torch.inf:
            raise ValueError(f"expected a positive finite threshold, got {self.threshold}")

    def __call__(self, layer: LayerView) -> Tensor:
        size = layer.values.abs()
        return size.masked_fill(size >= self.threshold, torch.inf)


@dataclass(frozen=True)
class MagnitudeAndGradient:
    """|w| + `gradient_weight` * |dL/dw|: a small weight that is about to grow stays.

    Yuan et al., "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge", 2021.
    """

    gradient_weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("gradient_weight", self.gradient_weight)
        if not 0 <= self.gradient_weight < torch.inf:
            raise ValueError(f"expected gradient_weight to be finite and at least 0, got {self.gradient_weight}")

    def __call__(self, layer: LayerView) -> Tensor:
        return layer.values.abs() + self.gradient_weight * layer.gradient.abs()
