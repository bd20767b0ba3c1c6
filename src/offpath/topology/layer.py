"""One layer as the rules of a topology see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from offpath import pattern as patterns
from offpath.pattern import Pattern
from offpath.topology.capture import Pass
from offpath.topology.errors import TopologyError
from offpath.topology.select import ScoreRows, best_free


@dataclass(frozen=True, eq=False)
class LayerView:
    """What a drop or grow rule may look at; nothing here is to be written into.

    `values` [nnz] are detached, in the order of `pattern`; `generator` is the topology's own, on the CPU, for whatever
    is drawn. Positions are row-major: row * in_features + column, int64.
    """

    name: str
    pattern: Pattern
    values: Tensor
    generator: torch.Generator
    initial_nnz: int
    values_grad: Tensor | None = field(repr=False)
    passes: tuple[Pass, ...] = field(repr=False)  # of this step
    history: tuple[Pass, ...] = field(default=(), repr=False)  # of the steps before, where the rule reads several
    # In place: of a tensor that every process has, their mean.
    average: Callable[[Tensor], Tensor] = field(default=lambda mine: mine, repr=False)

    @property
    def nnz(self) -> int:
        """Connections before this update."""
        return self.pattern.nnz

    @property
    def size(self) -> int:
        """Positions of the dense weight: out_features * in_features."""
        return self.pattern.shape[0] * self.pattern.shape[1]

    @property
    def free_count(self) -> int:
        """Positions that are not connections."""
        return self.size - self.nnz

    @property
    def gradient(self) -> Tensor:
        """Gradient of the existing connections [nnz]. Raises `TopologyError` when it is missing or not finite."""
        if self.values_grad is None:
            raise TopologyError(
                f"layer {self.name!r}: expected values.grad, got None; call topology.step() after optimizer.step() and "
                "before optimizer.zero_grad()"
            )
        if not bool(self.values_grad.isfinite().all()):
            raise TopologyError(f"layer {self.name!r}: expected finite gradients, got NaN or inf in values.grad")
        return self.values_grad

    @cached_property
    def positions(self) -> Tensor:
        """Position of each connection, ascending, int64 [nnz]."""
        return self.pattern.positions()

    def draw_free(self, count: int) -> Tensor:
        """`count` distinct free positions, ascending, every such set equally likely; O(nnz + count) memory.

        Raises `TopologyError` when fewer are free.
        """
        if count > self.free_count:
            raise TopologyError(
                f"layer {self.name!r}: expected {count} free positions to grow, but only {self.free_count} of "
                f"{self.size} are free"
            )
        ranks = patterns.distinct(self.free_count, count, self.generator).to(self.pattern.device)
        # Connection i stands behind positions[i] - i free ones: the free position of rank r stands behind all
        # connections for which that is at most r.
        free_before = self.positions - torch.arange(self.nnz, device=self.pattern.device)
        return ranks + torch.searchsorted(free_before, ranks, right=True)

    def best_free(self, scores_of_rows: ScoreRows, count: int) -> Tensor:
        """The `count` free positions of the highest score, ascending; among equals, the lower positions.

        `scores_of_rows(first, last)` returns a floating tensor [last - first, in_features]. It is called block by
        block, so that scores of all positions never exist at once. -inf says never.
        Raises `TopologyError` for NaN or inf, or when fewer positions can be grown.
        """
        return best_free(self.name, self.pattern, self.positions, scores_of_rows, count)

    def gradient_of_rows(self, first: int, last: int) -> Tensor:
        """The dense gradient's rows [first, last), summed over all passes since the last step, float32 or float64.

        Only for rules with `needs_dense_gradient = True`; with `gradient_steps`, of that many steps, each times
        `gradient_decay` to the power of its age. The mean over all processes that train together: each must ask for
        the same rows in the same order. Raises `TopologyError` when no pass of this step was seen.
        """
        if not self.passes:
            raise TopologyError(
                f"layer {self.name!r}: expected a forward and backward pass through it, into values.grad, between the "
                "last two calls of topology.step(), saw none. A rule that reads gradients needs needs_dense_gradient = "
                "True; a compiled model must run uncompiled while topology.watching, under "
                "torch.compiler.set_stance('force_eager'); a copied or unpickled topology watches no model: make it "
                "anew for the copy of the model, and load its state_dict"
            )
        gradient = self._operands[0].x.new_empty(last - first, self.pattern.shape[1])
        for index, (x, dy, weight) in enumerate(self._operands):
            gradient.addmm_(dy[:, first:last].t(), x, beta=min(index, 1), alpha=weight)  # beta=0 does not read
        return self.average(gradient)

    @cached_property
    def _operands(self) -> tuple[Pass, ...]:
        wide = torch.float64 if self.values.dtype == torch.float64 else torch.float32
        both = (*self.history, *self.passes)
        return tuple(Pass(_rows(x).to(wide), _rows(dy).to(wide), weight) for x, dy, weight in both)


def with_unused(layers: Sequence[LayerView], reads_passes: bool) -> list[LayerView]:
    """A layer that the step did not use, as others were, has a gradient of zero: a router may have left it out."""
    used_passes = reads_passes and any(layer.passes for layer in layers)
    if not any(layer.values_grad is not None for layer in layers):
        return list(layers)
    completed = []
    for layer in layers:
        gradient = torch.zeros_like(layer.values) if layer.values_grad is None else layer.values_grad
        # With a gradient and without a pass, a layer was used, but not seen: compiled, for one.
        unused = used_passes and not layer.passes and not bool(gradient.any())
        passes = (empty_pass(layer),) if unused else layer.passes
        completed.append(replace(layer, values_grad=gradient, passes=passes))
    return completed


def empty_pass(layer: LayerView) -> Pass:
    """A pass of no tokens."""
    rows, columns = layer.pattern.shape
    return Pass(layer.values.new_empty(0, columns), layer.values.new_empty(0, rows))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])
