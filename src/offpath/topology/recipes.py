"""The recipes that have names."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from offpath.topology import drop, grow
from offpath.topology.budget import Budget, PerLayer, Redistribute, Shrink
from offpath.topology.controller import Topology
from offpath.topology.recipe import Recipe
from offpath.topology.schedules import Cubic, Every, drop_fraction_schedule


def Static(model: nn.Module, optimizer: Optimizer, **options: Any) -> Topology:
    """Connections that stay as they are, behind the same interface: the baseline of every comparison.

    `options` are those of `Topology`: `seed`, `also`, `filter_fn`, `grown_state`, `record_explored`.

    >>> import torch
    >>> from offpath import SparseLinear
    >>> layer = SparseLinear(64, 32)
    >>> Static(layer, torch.optim.SGD(layer.parameters(), lr=0.1)).step() is None
    True
    """
    return Topology(model, optimizer, Recipe("Static"), **options)


def SET(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    drop_fraction: float = 0.3,
    update_freq: int = 100,
    end_step: int | None = None,
    schedule: str = "constant",
    distribution: str = "per-layer",
    **options: Any,
) -> Topology:
    """Sparse evolutionary training: the smallest weights go, random connections come.

    Every `update_freq` steps before `end_step` (None: for ever), each layer drops `drop_fraction` of its connections
    and grows as many. `schedule="cosine"` lets the fraction fall to zero at `end_step`. With `distribution="global"`,
    the smallest of all layers go, and layers grow in proportion to what survived in them. What was dropped is not
    grown in the same update. `options` are those of `Topology`.

    Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
    network science", 2018. Raises `ValueError` for a bad argument, `TopologyError` when model and optimizer do not fit.

    >>> import torch
    >>> from offpath import SparseLinear
    >>> layer = SparseLinear(64, 32)
    >>> topology = SET(layer, torch.optim.SGD(layer.parameters(), lr=0.1), drop_fraction=0.5, update_freq=1)
    >>> update = topology.step()
    >>> update.dropped, update.grown, layer.nnz
    (102, 102, 205)
    """
    return _moving(
        "SET", model, optimizer, drop.magnitude, grow.random,
        drop_fraction, update_freq, end_step, schedule, distribution, options,
    )  # fmt: skip


def RigL(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    drop_fraction: float = 0.3,
    update_freq: int = 100,
    end_step: int | None = None,
    schedule: str = "cosine",
    distribution: str = "per-layer",
    **options: Any,
) -> Topology:
    """The smallest weights go, connections of the largest gradient come.

    The gradient of the connections that do not exist is computed in the step of an update alone, in blocks of rows,
    from all passes since the last optimizer step; a dense gradient never exists. `end_step` is needed for the cosine
    schedule: three quarters of the training steps is usual. Otherwise as `SET`.

    Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020. (There, a connection dropped in an update may
    be grown in it again; here it may from the next one on.)

    >>> import torch
    >>> from offpath import SparseLinear
    >>> layer = SparseLinear(64, 32)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> topology = RigL(layer, optimizer, drop_fraction=0.3, update_freq=100, end_step=75_000)
    >>> for _ in range(100):
    ...     layer(torch.randn(8, 64)).square().sum().backward()
    ...     optimizer.step()
    ...     update = topology.step()
    ...     optimizer.zero_grad()
    >>> update.step, update.grown
    (100, 61)
    """
    return _moving(
        "RigL", model, optimizer, drop.magnitude, grow.Gradient(),
        drop_fraction, update_freq, end_step, schedule, distribution, options,
    )  # fmt: skip


def MEST(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    drop_fraction: float = 0.3,
    update_freq: int = 100,
    end_step: int | None = None,
    gradient_weight: float = 1.0,
    schedule: str = "constant",
    distribution: str = "per-layer",
    **options: Any,
) -> Topology:
    """The connections of the smallest |w| + `gradient_weight` * |dL/dw| go, random ones come.

    Reads the gradient of the existing connections only: call `step()` before `optimizer.zero_grad()`. One that is
    missing is refused, but one of zeros cannot be told from that of a layer that nothing came through: after
    `zero_grad(set_to_none=False)`, the smallest |w| alone would go, as in `SET`. Otherwise as `SET`.

    Yuan et al., "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on the Edge", 2021 (its elastic
    mutation).

    >>> import torch
    >>> from offpath import SparseLinear
    >>> layer = SparseLinear(64, 32)
    >>> topology = MEST(layer, torch.optim.SGD(layer.parameters(), lr=0.1), update_freq=1)
    >>> layer(torch.randn(8, 64)).sum().backward()
    >>> topology.step().dropped
    62
    """
    return _moving(
        "MEST", model, optimizer, drop.MagnitudeAndGradient(gradient_weight), grow.random,
        drop_fraction, update_freq, end_step, schedule, distribution, options,
    )  # fmt: skip


def GMP(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    final_sparsity: float,
    end_step: int,
    start_step: int = 0,
    update_freq: int = 100,
    distribution: str = "uniform",
    **options: Any,
) -> Topology:
    """Gradual magnitude pruning: the smallest weights go, until the layers have `final_sparsity` at `end_step`.

    Begins at the sparsity that the model has; `offpath.sparsify(model, 0, method="magnitude")` makes a dense model one
    of sparse layers with every connection. Between `start_step` and `end_step`, the sparsity follows a cubic curve.
    `distribution` "uniform" prunes each layer to `final_sparsity`, "erk" to its Erdos-Renyi share of it, "global"
    ranks the weights of all layers together. `options` are those of `Topology`.

    Zhu & Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017.
    Raises `ValueError` for a bad argument and `TopologyError` for a final sparsity below the start, or one that would
    take the last connection of a layer.

    >>> import torch
    >>> from offpath import SparseLinear
    >>> layer = SparseLinear(64, 32, sparsity=0)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> topology = GMP(layer, optimizer, final_sparsity=0.9, end_step=4, update_freq=2)
    >>> [(update.step, layer.nnz) for _ in range(4) if (update := topology.step())]
    [(2, 435), (4, 205)]
    """
    schedule = Every(update_freq, end_step, start_step, at_end=True)
    budget = Shrink(final_sparsity, Cubic(end_step, start_step), distribution)
    return Topology(model, optimizer, Recipe("GMP", schedule, drop.magnitude, None, budget), **options)


def _moving(
    name: str,
    model: nn.Module,
    optimizer: Optimizer,
    drop_rule: drop.DropRule,
    grow_rule: grow.GrowRule,
    drop_fraction: float,
    update_freq: int,
    end_step: int | None,
    schedule: str,
    distribution: str,
    options: dict[str, Any],
) -> Topology:
    fraction = drop_fraction_schedule(schedule, drop_fraction, end_step)
    budgets: dict[str, Budget] = {"per-layer": PerLayer(fraction), "global": Redistribute(fraction)}
    if distribution not in budgets:
        raise ValueError(f"expected distribution to be one of {', '.join(budgets)}, got {distribution!r}")
    recipe = Recipe(name, Every(update_freq, end_step), drop_rule, grow_rule, budgets[distribution])
    return Topology(model, optimizer, recipe, **options)
