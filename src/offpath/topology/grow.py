"""What to grow: a rule names free positions.

A grow rule is any callable `rule(layer: LayerView, count: int) -> Tensor`: `count` distinct positions that are not
connections, int64. A rule with an attribute `needs_dense_gradient = True` may call `layer.gradient_of_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from offpath.topology.layer import LayerView

GrowRule = Callable[[LayerView, int], Tensor]


def random(layer: LayerView, count: int) -> Tensor:
    """Every free position is as likely as any other."""
    return layer.draw_free(count)


@dataclass(frozen=True)
class Gradient:
    """Where the absolute gradient of the dense weight is largest (Evci et al., "Rigging the Lottery", 2020)."""

    needs_dense_gradient: ClassVar[bool] = True

    def __call__(self, layer: LayerView, count: int) -> Tensor:
        return layer.best_free(lambda first, last: layer.gradient_of_rows(first, last).abs_(), count)


def needs_dense_gradient(rule: GrowRule | None) -> bool:
    """Whether the passes before an update must be watched for this rule."""
    return getattr(rule, "needs_dense_gradient", False)
