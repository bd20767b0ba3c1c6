"""How many connections a layer drops and grows, and whether it can."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offpath.topology.errors import TopologyError
from offpath.topology.layer import LayerView


class Quota(NamedTuple):
    """Connections that a layer drops and grows."""

    drop: int
    grow: int


def droppable(importance: Tensor) -> int:
    """Connections that may go: an importance of inf says never."""
    return int((importance < torch.inf).sum())


def check_quotas(quotas: Any, layers: Sequence[LayerView], importances: Sequence[Tensor]) -> list[Quota]:
    """What a budget returned, in ints. Raises `TopologyError` unless each layer can drop and grow as many."""
    pairs = list(quotas) if isinstance(quotas, Iterable) else None
    if pairs is None or len(pairs) != len(layers):
        raise TopologyError(
            f"expected the budget to return a Quota(drop, grow) for each of the {len(layers)} layers, got {quotas!r}"
        )
    return [_checked(*each) for each in zip(pairs, layers, importances, strict=True)]


def _checked(pair: Any, layer: LayerView, importance: Tensor) -> Quota:
    try:
        drop, grow = map(operator.index, pair)
    except (TypeError, ValueError):
        drop = grow = -1
    if drop < 0 or grow < 0:
        raise TopologyError(
            f"layer {layer.name!r}: expected the budget to return a Quota(drop, grow) of whole numbers of at least 0, "
            f"got {pair!r}"
        )
    if drop and drop > (most := droppable(importance)):
        raise TopologyError(
            f"layer {layer.name!r}: expected a budget of at most {most} connections to drop, got {drop}: it has "
            f"{layer.nnz}, of which the drop rule keeps {layer.nnz - most}"
        )
    if grow > layer.free_count:
        raise TopologyError(
            f"layer {layer.name!r}: expected {grow} free positions to grow, as the budget asks, but only "
            f"{layer.free_count} of {layer.size} are free"
        )
    if layer.nnz and layer.nnz - drop + grow == 0:
        raise TopologyError(
            f"layer {layer.name!r}: expected a connection to stay, but all {layer.nnz} would go; lower "
            "drop_fraction or final_sparsity, or leave the layer out with filter_fn"
        )
    return Quota(int(drop), int(grow))
