"""Bad input: a clear error, and everything as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import offpath
from offpath import SparseLinear
from offpath.nn import Int8SparseLinear, PackedSparseLinear, SparseConv2d
from offpath.topology import (
    Constant,
    Cosine,
    Cubic,
    Every,
    PerLayer,
    Quota,
    Recipe,
    Redistribute,
    Shrink,
    Topology,
    TopologyError,
    drop,
    grow,
)
from topology_checks import model_of, train_step


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _tied() -> nn.Module:
    model = nn.Sequential(SparseLinear(8, 8), SparseLinear(8, 8))
    model[1].values = model[0].values
    return model


def _pruned() -> nn.Module:
    model = model_of()
    prune.l1_unstructured(model[0], "values", 0.5)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: offpath.SET(m := nn.Linear(4, 4), _sgd(m)), "found none; make some with offpath.sparsify"),
        (
            lambda: offpath.SET(m := offpath.SparseLinear(4, 4).requires_grad_(False), _sgd(m)),
            r"found none; 1 are frozen, which requires_grad_\(True\) changes",
        ),
        (lambda: offpath.SET(m := model_of(), _sgd(m), filter_fn=lambda _, fqn: False), "none that filter_fn takes"),
        (lambda: offpath.SET(m := model_of().requires_grad_(False), _sgd(m)), "trainable SparseLinear layers"),
        (lambda: offpath.SET(model_of(), _sgd(model_of())), "layer '0': expected an optimizer that holds its values"),
        (lambda: offpath.SET(m := _tied(), _sgd(m)), "layer '1': .* tied to those of '0'"),
        (
            lambda: offpath.SET(m := _tied(), _sgd(m), filter_fn=lambda _, name: name == "1"),
            "layer '1': .* tied to those of '0', whose connections would not move along",
        ),
        (lambda: offpath.SET(m := _pruned(), _sgd(m)), "layer '0': .*mask or weight_norm"),
        (lambda: offpath.RigL(m := model_of(density=1.0), _sgd(m), end_step=900), "all are full or empty"),
        (lambda: offpath.Static(model_of(), None), "expected the optimizer that trains the model, got NoneType"),
        (lambda: offpath.SET(model_of(), None), "expected the optimizer that trains the model, got NoneType"),
        (lambda: offpath.SET(m := model_of(), _sgd(m), also=[m]), "got the model itself"),
        (
            lambda: offpath.SET(m := model_of(), _sgd(m), also=AveragedModel(m)),
            r"expected a list of models in also, got AveragedModel; write also=\[model\]",
        ),
        (lambda: offpath.SET(m := model_of(), _sgd(m), also=copy.deepcopy(m)), "also, got Sequential"),
        (lambda: offpath.SET(m := model_of(), _sgd(m), also=None), "expected a list of models in also, got None"),
        (lambda: offpath.SET(m := model_of(), _sgd(m), also=[model_of(seed=1)]), "the same connections in the copy"),
        (lambda: offpath.SET(m := model_of(), _sgd(m), also=[nn.Linear(2, 2)]), "found no SparseLinear '0' in it"),
        (
            lambda: offpath.GMP(m := model_of(density=0.1), _sgd(m), final_sparsity=0.8, end_step=9),
            "layer '0': expected a final sparsity of at least 0.9, where it starts, got 0.8",
        ),
        (
            lambda: offpath.GMP(
                m := model_of(density=0.1), _sgd(m), final_sparsity=0.8, end_step=9, distribution="global"
            ),
            "the model: expected a final sparsity of at least 0.9",
        ),
        (
            lambda: offpath.GMP(m := model_of(), _sgd(m), final_sparsity=0.999, end_step=9),
            "layer '0': expected a connection to stay",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused(build: Callable[[], Topology], message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        build()


class Hasty:
    needs_dense_gradient = True
    gradient_steps = 2.5

    def __call__(self, layer, count: int) -> Tensor:
        return layer.draw_free(count)


def _of(**parts: object) -> Recipe:
    good = {"schedule": Every(2), "drop": drop.magnitude, "grow": grow.random, "budget": PerLayer(Constant(0.3))}
    return Recipe("mine", **good | parts)  # type: ignore[arg-type]  # wrong parts are what is tested


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m, o: offpath.SET(m, o, drop_fraction=0.0), r"drop_fraction in \(0, 1\], got 0.0"),
        (lambda m, o: offpath.SET(m, o, drop_fraction=float("nan")), r"drop_fraction in \(0, 1\]"),
        (lambda m, o: offpath.SET(m, o, update_freq=0), "update_freq of at least 1"),
        (lambda m, o: offpath.SET(m, o, end_step=0), "start_step < end_step"),
        (
            lambda m, o: offpath.RigL(m, o, end_step=75),
            "an update before end_step=75, but the first would be at step 100; lower update_freq, or take Static",
        ),
        (lambda m, o: Every(3, end_step=3), "the first would be at step 3"),
        (lambda m, o: offpath.SET(m, o, schedule="linear"), "'constant' or 'cosine', got 'linear'"),
        (lambda m, o: offpath.SET(m, o, distribution="erk"), "per-layer, global, got 'erk'"),
        (offpath.RigL, "an end_step for the cosine schedule"),
        (lambda m, o: offpath.MEST(m, o, gradient_weight=-1.0), "gradient_weight to be finite"),
        (lambda m, o: offpath.GMP(m, o, final_sparsity=1.0, end_step=9), r"final_sparsity in \(0, 1\)"),
        (lambda m, o: offpath.GMP(m, o, final_sparsity=0.9, end_step=9, distribution="x"), "uniform, erk, global"),
        (lambda m, o: offpath.GMP(m, o, final_sparsity=0.9, end_step=9, start_step=9), "start_step < end_step"),
        (lambda m, o: drop.Threshold(-1.0), "positive finite threshold"),
        (lambda m, o: Recipe("half", Every(1)), "a drop rule and a budget beside the schedule"),
        (lambda m, o: Every(1, at_end=True), "an end_step for an update at the end"),
        (
            lambda m, o: offpath.GMP(m, o, final_sparsity=0.9, end_step=4.5, update_freq=2),
            r"expected end_step to be a whole number, got 4.5; pass an int, for example round\(0.75 \* steps\)",
        ),
        (lambda m, o: offpath.GMP(m, o, final_sparsity="0.9", end_step=4), "final_sparsity to be a number, got '0.9'"),
        (lambda m, o: offpath.RigL(m, o, end_step=float("inf")), "end_step to be a whole number, got inf"),
        (lambda m, o: offpath.SET(m, o, update_freq=2.5), "update_freq to be a whole number, got 2.5"),
        (lambda m, o: offpath.SET(m, o, update_freq=float("nan")), "update_freq to be a whole number, got nan"),
        (lambda m, o: offpath.SET(m, o, update_freq="10"), "update_freq to be a whole number, got '10'"),
        (lambda m, o: offpath.SET(m, o, drop_fraction="0.3"), "drop_fraction to be a number, got '0.3'"),
        (lambda m, o: offpath.SET(m, o, drop_fraction=None), "drop_fraction to be a number, got None"),
        (lambda m, o: offpath.MEST(m, o, gradient_weight="1"), "gradient_weight to be a number, got '1'"),
        (lambda m, o: offpath.SET(m, o, seed=None), "seed to be a whole number, got None; pass an int, such as 0"),
        (lambda m, o: grow.Momentum(0.9, steps=1.5), "steps to be a whole number, got 1.5"),
        (lambda m, o: grow.Momentum("0.9"), "momentum to be a number, got '0.9'"),
        (lambda m, o: drop.Threshold("1"), "threshold to be a number, got '1'"),
        (lambda m, o: Every(1, start_step=0.5), "start_step to be a whole number, got 0.5"),
        (lambda m, o: Cubic(end_step=4.5), "end_step to be a whole number, got 4.5"),
        (lambda m, o: Cubic(end_step=2, start_step=2), "0 <= start_step < end_step"),
        (lambda m, o: _of(schedule=10), r"schedule to be something like Every\(update_freq=100\), got 10"),
        (lambda m, o: _of(drop="magnitude"), "drop to be something like drop.magnitude, got 'magnitude'"),
        (lambda m, o: _of(grow=grow.Gradient), r"grow to be an instance, got the class Gradient; write Gradient\("),
        (lambda m, o: _of(grow=Hasty()), "gradient_steps of the grow rule to be a whole number, got 2.5"),
        (lambda m, o: _of(budget=0.3), r"budget to be something like PerLayer\(Constant\(0.3\)\), got 0.3"),
        (lambda m, o: _of(budget=PerLayer), r"budget to be an instance, got the class PerLayer; write PerLayer\("),
        (lambda m, o: PerLayer(0.3), r"drop_fraction to be something like Constant\(0.3\), got 0.3"),
        (lambda m, o: Redistribute(0.3), r"drop_fraction to be something like Constant\(0.3\), got 0.3"),
        (lambda m, o: PerLayer(Constant), r"got the class Constant; write Constant\("),
        (lambda m, o: Shrink(0.9, 0.3), r"remaining to be something like Cubic\(end_step=1000\), got 0.3"),
    ],
)
def test_a_bad_argument_is_refused(build, message: str) -> None:
    model = model_of()
    with pytest.raises(ValueError, match=message):
        build(model, _sgd(model))


def test_whole_numbers_of_other_libraries_are_those_of_python() -> None:
    for mine, other in ((Every(2, 9, 1), Every(*np.array([2, 9, 1]))), (Cosine(0.3, 9), Cosine(0.3, torch.tensor(9)))):
        assert repr(mine) == repr(other), "a checkpoint of one is one of the other"
    model = model_of()
    assert offpath.SET(model, _sgd(model), update_freq=np.int32(1), seed=np.int64(3)).step() is not None


class Fixed(PerLayer):
    """A budget that asks for what it was told."""

    quotas: tuple[Quota, ...] = ()

    def __call__(self, step, layers, importances):
        return list(self.quotas)


def _with(drop_rule=drop.magnitude, grow_rule=grow.random, quotas: tuple[Quota, ...] = ()) -> Recipe:
    budget = PerLayer(Constant(0.3))
    if quotas:
        budget = type("Told", (Fixed,), {"quotas": quotas})(Constant(0.3))
    return Recipe("bad", Every(2), drop_rule, grow_rule, budget)


def _nan_in_the_last_layer(layer) -> Tensor:
    return layer.values.abs() * (torch.nan if layer.name == "2" else 1)


def _reads_gradients_unannounced(layer, count: int) -> Tensor:
    return grow.Gradient()(layer, count)


# What goes wrong, some of it in the last layer, when the first has been decided.
RECIPES = {
    "nothing free": (_with(quotas=(Quota(1, 1), Quota(0, 43))), "layer '2': expected 43 free .* only 42 of 60"),
    "last connection": (
        _with(quotas=(Quota(1, 1), Quota(18, 0))),
        "layer '2': expected a connection to stay, but all 18",
    ),
    "quotas of too few layers": (
        _with(quotas=(Quota(1, 1),)),
        r"Quota\(drop, grow\) for each of the 2 layers, got \[Quota",
    ),
    "no quotas": (_with(quotas=(None, None)), r"layer '0': .* Quota\(drop, grow\) of whole numbers .* got None"),
    "a negative quota": (_with(quotas=(Quota(1, 1), Quota(1, -1))), "layer '2': .* at least 0, got Quota.*grow=-1"),
    "half a connection": (_with(quotas=(Quota(1, 1), Quota(0.5, 1))), "layer '2': .* whole numbers .*drop=0.5"),
    "more dropped than there are": (
        _with(quotas=(Quota(1, 1), Quota(19, 9))),
        "layer '2': expected a budget of at most 18 connections to drop, got 19",
    ),
    "dropped what never goes": (
        _with(lambda layer: torch.full((layer.nnz,), torch.inf), quotas=(Quota(1, 1), Quota(0, 0))),
        "layer '0': .* at most 0 connections to drop, got 1: it has 36, of which the drop rule keeps 36",
    ),
    "a fraction above one": (_of(budget=PerLayer(lambda step: 1.5)), r"drop_fraction in \[0, 1\] at step 2, got 1.5"),
    "no fraction": (_of(budget=Redistribute(lambda step: None)), "at step 2, got None from function"),
    "no importance": (_with(lambda layer: None), "layer '0': .* return 36 floating numbers, got None"),
    "nothing grown": (
        _with(grow_rule=lambda layer, count: None),
        "layer '0': .* return 11 positions in int64, got None",
    ),
    "no grow rule": (_with(grow_rule=None, quotas=(Quota(1, 0), Quota(1, 1))), "has no grow rule"),
    "NaN importance": (_with(_nan_in_the_last_layer), "layer '2': expected importances without NaN"),
    "importance of another size": (_with(lambda layer: layer.values[:3]), "layer '0': .* 36 floating numbers, got .*3"),
    "integer importance": (_with(lambda layer: layer.values.long()), "floating numbers, got torch.int64"),
    "too few grown": (_with(grow_rule=lambda layer, count: layer.draw_free(count - 1)), "return 11 positions in int64"),
    "grown twice": (
        _with(grow_rule=lambda layer, count: layer.draw_free(1).expand(count)),
        "layer '0': expected distinct connections to grow",
    ),
    "grown on a survivor": (
        _with(grow_rule=lambda layer, count: layer.positions[-count:]),
        "layer '.': expected free positions",
    ),
    "grown outside": (
        _with(grow_rule=lambda layer, count: layer.size + torch.arange(count)),
        r"layer '0': expected rows in \[0, 10\)",
    ),
    "no dense gradient": (_with(grow_rule=_reads_gradients_unannounced), "needs_dense_gradient"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_update_that_cannot_be_made_changes_nothing(recipe: str) -> None:
    model = model_of()
    optimizer, average = _sgd(model), AveragedModel(model)
    parts, message = RECIPES[recipe]
    topology = Topology(model, optimizer, parts, also=[average])
    train_step(model, optimizer, 1)
    assert topology.step() is None
    train_step(model, optimizer, 2)
    things = (model, average, optimizer, topology)
    before = copy.deepcopy([thing.state_dict() for thing in things])
    with pytest.raises(TopologyError, match=message):
        topology.step()
    assert _equal(before, [thing.state_dict() for thing in things])


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))  # type: ignore[arg-type]  # both are sequences
    return a == b


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = model_of()
    optimizer = _sgd(model)
    topology = offpath.MEST(model, optimizer, update_freq=1)
    with pytest.raises(TopologyError, match=r"layer '0': expected values.grad, got None; call topology.step\(\) after"):
        topology.step()
    train_step(model, optimizer, 1)
    model[2].values.grad[3] = torch.inf
    with pytest.raises(TopologyError, match="layer '2': expected finite gradients"):
        topology.step()
    model[2].values.grad[3] = 0
    model[2].values.data[3] = torch.nan
    with pytest.raises(TopologyError, match="layer '2': expected finite weights"):
        topology.step()
    model[2].values.data[3] = 0
    assert topology.step() is not None


def test_connections_that_somebody_else_has_changed_are_noticed() -> None:
    model = model_of()
    topology = offpath.SET(model, _sgd(model), update_freq=1)
    model.load_state_dict(model_of(seed=5).state_dict())
    for ask in (topology.step, topology.survey):
        with pytest.raises(TopologyError, match=r"layer '0': .* they have changed since"):
            ask()


def test_state_in_a_tensor_of_another_kind_is_refused_before_anything_changes() -> None:
    """As optimizers of 8 bits keep it, of large layers only."""

    class Quantised(Tensor):
        pass

    model = model_of()
    optimizer = _sgd(model)
    topology = offpath.SET(model, optimizer, update_freq=1)
    train_step(model, optimizer, 1)
    state = optimizer.state[model[2].values]
    state["momentum_buffer"] = state["momentum_buffer"].as_subclass(Quantised)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TopologyError, match="layer '2': expected the state 'momentum_buffer' of SGD in a plain tensor"):
        topology.step()
    assert _equal(before, model.state_dict())


@pytest.mark.parametrize("replace", [offpath.densify, lambda model: model.__setitem__(2, SparseLinear(9, 3))])
def test_layers_that_are_no_longer_in_the_model_are_not_moved(replace: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(SparseLinear(12, 9), nn.ReLU(), SparseLinear(9, 4))
    topology = offpath.SET(model, _sgd(model), update_freq=1)
    old = [model[0].pattern, model[2].pattern]
    layers = model[0], model[2]
    replace(model)
    for ask in (topology.step, topology.survey):
        with pytest.raises(TopologyError, match="expected the layer that was in the model when this topology was made"):
            ask()
    assert all(layer.pattern.equals(pattern) for layer, pattern in zip(layers, old, strict=True))


@pytest.mark.parametrize(
    "give_away",
    [
        lambda layer: layer.state_dict(),
        lambda layer: layer.to_dense(),
        Int8SparseLinear.from_sparse,
        partial(PackedSparseLinear.from_sparse, tokens=4),
        lambda layer: offpath.densify(nn.Sequential(layer)),
    ],
    ids=["state_dict", "to_dense", "int8", "packed", "densify"],
)
def test_an_average_over_two_topologies_cannot_be_given_away(give_away: Callable[[SparseLinear], object]) -> None:
    """What it is given to would belong together, and nobody would notice any more."""
    layer = SparseLinear(64, 32)
    optimizer, average = _sgd(layer), AveragedModel(layer)
    topology = offpath.SET(layer, optimizer, update_freq=1)  # without also=[average]
    layer(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    topology.step()
    average.update_parameters(layer)
    give_away(layer)
    with pytest.raises(RuntimeError, match=r"to be named in also=\[\.\.\.\]"):
        give_away(average.module)


def test_a_convolution_with_values_of_another_topology_cannot_be_given_away() -> None:
    conv = SparseConv2d(8, 8, 3)
    conv.to_dense()
    conv.topology_digest += conv.topology_digest // 2
    with pytest.raises(RuntimeError, match="the topologies differ"):
        conv.to_dense()


def test_a_copy_that_has_other_connections_by_now_is_noticed_before_anything_changes() -> None:
    model = model_of()
    average = AveragedModel(model)
    topology = offpath.SET(model, _sgd(model), update_freq=1, also=[average])
    average.module[2].load_state_dict(model_of(seed=5)[2].state_dict())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TopologyError, match="layer '2': expected an edit of this layer's pattern"):
        topology.step()
    assert _equal(before, model.state_dict())


def test_global_pruning_that_would_empty_a_layer_is_refused() -> None:
    model = model_of()
    model[2].values.data *= 1e-6
    topology = offpath.GMP(model, _sgd(model), final_sparsity=0.9, end_step=1, distribution="global")
    with pytest.raises(TopologyError, match="layer '2': expected a connection to stay"):
        topology.step()


def test_a_full_layer_stays_and_the_others_move() -> None:
    model = nn.Sequential(SparseLinear(12, 10, density=0.3), SparseLinear(10, 4, density=1))
    topology = offpath.RigL(model, _sgd(model), update_freq=1, end_step=9)
    model(torch.randn(3, 12)).sum().backward()
    update = topology.step()
    assert update is not None and [layer.dropped for layer in update.layers] == [10, 0]
