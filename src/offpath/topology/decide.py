"""One update, decided: what every layer drops and grows; no layer is changed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from offpath.pattern import Pattern
from offpath.topology.budget import Quota
from offpath.topology.errors import TopologyError
from offpath.topology.layer import LayerView
from offpath.topology.recipe import Recipe
from offpath.topology.select import lowest


class Decision(NamedTuple):
    """What one layer is to drop (slots of `pattern`, ascending) and to grow (positions)."""

    pattern: Pattern
    drop: Tensor
    grow: Tensor


def decide(recipe: Recipe, step: int, layers: Sequence[LayerView]) -> list[Decision]:
    """What `recipe` makes of `layers` at `step`: a function of weights, gradients and generator.

    Raises `TopologyError` when a rule breaks its contract or the last connection of a layer would go.
    """
    assert recipe.drop is not None and recipe.budget is not None
    importances = [_importance(layer, recipe.drop(layer)) for layer in layers]
    quotas = recipe.budget(step, layers, importances)
    drops = [lowest(importance, quota.drop) for importance, quota in zip(importances, quotas, strict=True)]
    decisions = []
    for layer, quota, drop in zip(layers, quotas, drops, strict=True):
        if layer.nnz and layer.nnz - quota.drop + quota.grow == 0:
            raise TopologyError(
                f"layer {layer.name!r}: expected a connection to stay, but all {layer.nnz} would go; lower "
                "drop_fraction or final_sparsity, or leave the layer out with filter_fn"
            )
        decisions.append(Decision(layer.pattern, drop, _grown(recipe, layer, quota)))
    return decisions


def _grown(recipe: Recipe, layer: LayerView, quota: Quota) -> Tensor:
    if not quota.grow:
        return torch.empty(0, dtype=torch.int64, device=layer.pattern.device)
    if recipe.grow is None:
        raise TopologyError(f"the budget asks for growth, but recipe {recipe.name!r} has no grow rule")
    positions = recipe.grow(layer, quota.grow)
    if positions.shape != (quota.grow,) or positions.dtype != torch.int64:
        raise TopologyError(
            f"layer {layer.name!r}: expected the grow rule to return {quota.grow} positions in int64, got "
            f"{positions.dtype} {tuple(positions.shape)}"
        )
    return positions


def _importance(layer: LayerView, importance: Tensor) -> Tensor:
    if importance.shape != (layer.nnz,) or not importance.is_floating_point():
        raise TopologyError(
            f"layer {layer.name!r}: expected the drop rule to return {layer.nnz} floating numbers, got "
            f"{importance.dtype} {tuple(importance.shape)}"
        )
    if bool(importance.isnan().any()):
        raise TopologyError(
            f"layer {layer.name!r}: expected importances without NaN; weights or gradients are not finite"
        )
    return importance
