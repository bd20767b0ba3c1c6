"""What to grow: a rule names free positions.

A grow rule is any callable `rule(layer: LayerView, count: int) -> Tensor`: `count` distinct positions that are not
connections, int64. A rule with an attribute `needs_dense_gradient = True` may call `layer.gradient_of_rows`; with
`gradient_steps = n` and `gradient_decay = d` as well, that is the sum over the last n steps, d**age times each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from offpath.topology.layer import LayerView
from offpath.topology.settings import check_number, keep_whole

GrowRule = Callable[[LayerView, int], Tensor]


def random(layer: LayerView, count: int) -> Tensor:
    """Every free position is as likely as any other."""
    return layer.draw_free(count)


@dataclass(frozen=True)
class Gradient:
    """Where the absolute gradient of the dense weight is largest (Evci et al., "Rigging the Lottery", 2020)."""

    needs_dense_gradient: ClassVar[bool] = True

    def __call__(self, layer: LayerView, count: int) -> Tensor:
        return _largest_gradient(layer, count)


@dataclass(frozen=True)
class Momentum:
    """Where the absolute momentum of the dense weight is largest, over the last `steps` steps.

    That is the sum of momentum**age times the dense gradient of each step, cut off after `steps` of them or at the last
    update (Dettmers & Zettlemoyer, "Sparse Networks from Scratch", 2019, keep all of it in a dense matrix). Here the
    inputs and output gradients of these steps are kept instead: steps * batch * (in_features + out_features) numbers a
    layer. Choose `steps` for which that is little. A gradient scaler whose scale changes meanwhile weighs the steps
    before by the change; with bfloat16 there is none. Raises `ValueError` unless 0 < momentum <= 1 and steps >= 1.

    >>> rule = Momentum(momentum=0.9, steps=4)
    >>> rule.gradient_steps, rule.gradient_decay
    (4, 0.9)
    """

    needs_dense_gradient: ClassVar[bool] = True
    momentum: float = 0.9
    steps: int = 10

    def __post_init__(self) -> None:
        check_number("momentum", self.momentum)
        keep_whole(self, "steps")
        if not 0 < self.momentum <= 1 or self.steps < 1:
            raise ValueError(
                f"expected momentum in (0, 1] and at least 1 step, got momentum={self.momentum}, steps={self.steps}"
            )

    @property
    def gradient_steps(self) -> int:
        return self.steps

    @property
    def gradient_decay(self) -> float:
        return self.momentum

    def __call__(self, layer: LayerView, count: int) -> Tensor:
        return _largest_gradient(layer, count)


def _largest_gradient(layer: LayerView, count: int) -> Tensor:
    return layer.best_free(lambda first, last: layer.gradient_of_rows(first, last).abs_(), count)


def needs_dense_gradient(rule: GrowRule | None) -> bool:
    """Whether the passes before an update must be watched for this rule."""
    return getattr(rule, "needs_dense_gradient", False)


def gradient_steps(rule: GrowRule | None) -> int:
    """Of how many steps before an update the passes must be watched for this rule."""
    return getattr(rule, "gradient_steps", 1) if needs_dense_gradient(rule) else 0


def gradient_decay(rule: GrowRule | None) -> float:
    """What the passes of a step count less than those of the next one."""
    return getattr(rule, "gradient_decay", 1.0)
