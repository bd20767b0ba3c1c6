"""One update, decided: what every layer drops and grows; no layer is changed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from offpath.pattern import Pattern
from offpath.topology.errors import TopologyError
from offpath.topology.layer import LayerView
from offpath.topology.quotas import check_quotas
from offpath.topology.recipe import Recipe
from offpath.topology.select import lowest
from offpath.topology.settings import in_words


class Decision(NamedTuple):
    """What one layer is to drop (slots of `pattern`, ascending) and to grow (positions)."""

    pattern: Pattern
    drop: Tensor
    grow: Tensor


class Drops(NamedTuple):
    """What one layer is to drop (slots of its pattern, ascending), and how many connections it is to grow."""

    drop: Tensor
    grow_count: int


def decide_drops(recipe: Recipe, step: int, layers: Sequence[LayerView]) -> list[Drops]:
    """What `recipe` drops of `layers` at `step`, a function of weights, gradients and generator.

    Raises `TopologyError` when a rule breaks its contract or the last connection of a layer would go.
    """
    assert recipe.drop is not None and recipe.budget is not None
    importances = [_importance(layer, recipe.drop(layer)) for layer in layers]
    quotas = check_quotas(recipe.budget(step, layers, importances), layers, importances)
    if recipe.grow is None and any(quota.grow for quota in quotas):
        raise TopologyError(f"the budget asks for growth, but recipe {recipe.name!r} has no grow rule")
    return [Drops(lowest(i, quota.drop), quota.grow) for i, quota in zip(importances, quotas, strict=True)]


def decide_growth(recipe: Recipe, layers: Sequence[LayerView], drops: Sequence[Drops]) -> list[Decision]:
    """The whole decision: what `recipe` grows beside `drops`, layer by layer.

    Raises `TopologyError` when the grow rule breaks its contract.
    """
    return [
        Decision(layer.pattern, drop, _grown(recipe, layer, count))
        for layer, (drop, count) in zip(layers, drops, strict=True)
    ]


def _grown(recipe: Recipe, layer: LayerView, count: int) -> Tensor:
    if not count:
        return torch.empty(0, dtype=torch.int64, device=layer.pattern.device)
    assert recipe.grow is not None
    positions = recipe.grow(layer, count)
    if not isinstance(positions, Tensor) or positions.shape != (count,) or positions.dtype != torch.int64:
        raise TopologyError(
            f"layer {layer.name!r}: expected the grow rule to return {count} positions in int64, got "
            f"{in_words(positions)}"
        )
    return positions


def _importance(layer: LayerView, importance: Tensor) -> Tensor:
    fits = isinstance(importance, Tensor) and importance.is_floating_point() and importance.shape == (layer.nnz,)
    if not fits:
        raise TopologyError(
            f"layer {layer.name!r}: expected the drop rule to return {layer.nnz} floating numbers, got "
            f"{in_words(importance)}"
        )
    if bool(importance.isnan().any()):
        raise TopologyError(
            f"layer {layer.name!r}: expected importances without NaN; weights or gradients are not finite"
        )
    return importance
