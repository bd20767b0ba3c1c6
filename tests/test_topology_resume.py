"""A topology goes on from its checkpoint to the same bits; what it reports; other people's checkpoints are refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import offpath
from offpath.topology import Topology, TopologyError
from topology_checks import model_of, train_step
from topology_oracle import growing_by_momentum as momentum

RECIPES = {
    "SET": lambda m, o: offpath.SET(m, o, update_freq=3, seed=7),
    "SET global": lambda m, o: offpath.SET(m, o, update_freq=3, seed=7, distribution="global"),
    "RigL": lambda m, o: offpath.RigL(m, o, update_freq=3, end_step=30),
    "momentum": lambda m, o: momentum(m, o, steps=3, update_freq=3),
    "MEST": lambda m, o: offpath.MEST(m, o, update_freq=3),
    "GMP": lambda m, o: offpath.GMP(m, o, update_freq=3, end_step=20, final_sparsity=0.9),
    "Static": offpath.Static,
}


def _start(recipe: str, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, Topology]:
    model = model_of(seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return model, optimizer, RECIPES[recipe](model, optimizer)


def _run(parts: tuple[nn.Module, torch.optim.Optimizer, Topology], first: int, last: int) -> list:
    model, optimizer, topology = parts
    updates = []
    for step in range(first, last):
        train_step(model, optimizer, step)
        updates.append(topology.step())
    return updates


def _through_a_file(state: object) -> object:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("stop", [1, 5, 6, 7])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_equals_an_uninterrupted_one(recipe: str, stop: int) -> None:
    whole = _start(recipe)
    updates = _run(whole, 1, 14)
    interrupted = _start(recipe)
    _run(interrupted, 1, stop)
    saved = [_through_a_file(thing.state_dict()) for thing in interrupted]

    resumed = _start(recipe, seed=9)  # other connections, other values, until the checkpoint is loaded
    for thing, state in zip(resumed, saved, strict=True):
        thing.load_state_dict(state)
    assert _run(resumed, stop, 14) == updates[stop - 1 :]
    a, b = whole[0].state_dict(), resumed[0].state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)
    moments = [o.state[m[0].values]["exp_avg"] for m, o, _ in (whole, resumed)]
    assert torch.equal(*moments)


def test_a_state_dict_is_a_snapshot() -> None:
    parts = _start("SET")
    state = parts[2].state_dict()
    before = {name: layer["unmoved"].clone() for name, layer in state["layers"].items()}
    _run(parts, 1, 4)
    assert state["step"] == 0 and all(torch.equal(state["layers"][n]["unmoved"], u) for n, u in before.items())


def test_a_copy_of_other_connections_is_noticed_when_the_state_is_loaded() -> None:
    """Somebody has loaded the model, and forgotten its average."""
    model, average = model_of(), AveragedModel(model_of())
    topology = offpath.SET(model, torch.optim.SGD(model.parameters(), lr=0.1), update_freq=1, also=[average])
    topology.step()
    resumed, forgotten = model_of(), AveragedModel(model_of())
    other = offpath.SET(resumed, torch.optim.SGD(resumed.parameters(), lr=0.1), update_freq=1, also=[forgotten])
    resumed.load_state_dict(model.state_dict())
    with pytest.raises(TopologyError, match=r"layer '0': expected its copy in also=\[\.\.\.\] to have the connections"):
        other.load_state_dict(topology.state_dict())
    forgotten.load_state_dict(average.state_dict())
    other.load_state_dict(topology.state_dict())


def test_another_recipe_is_told_by_what_differs() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saved = offpath.RigL(model, optimizer, update_freq=2, end_step=20).state_dict()
    with pytest.raises(
        TopologyError, match=r"^expected a state that was saved with end_step=40, got one with end_step=20; "
    ):
        offpath.RigL(model, optimizer, update_freq=2, end_step=40).load_state_dict(saved)
    with pytest.raises(TopologyError, match=r"^expected a state of the recipe Recipe\(.*SET.*, got one of .*RigL"):
        offpath.SET(model, optimizer, update_freq=2).load_state_dict(saved)


def _tampered(change) -> dict:
    state = _start("SET")[2].state_dict()
    change(state)
    return state


def _put(**entries) -> Callable[[], dict]:
    return lambda: _start("SET")[2].state_dict() | entries


def _in_layer(**entries) -> Callable[[], dict]:
    """A state whose last layer is another one."""
    return lambda: _tampered(lambda state: state["layers"]["2"].update(entries))


def _not_in_layer(key: str) -> Callable[[], dict]:
    return lambda: _tampered(lambda state: state["layers"]["2"].pop(key))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (_start("MEST")[2].state_dict, "expected a state of the recipe .*name='SET'.* got one of .*'MEST'"),
        (_start("SET global")[2].state_dict, "PerLayer.*got one of .*Redistribute"),
        (_start("SET", seed=1)[2].state_dict, "layer '0': .* load the model's checkpoint before"),
        (lambda: _tampered(lambda s: s["layers"].pop("2")), r"the layers \['0', '2'\], got one of \['0'\]"),
        (lambda: _tampered(lambda s: s.pop("generator")), r"of a topology, got one without \['generator'\]; pass on"),
        (_put(version=2), "version 1, got version 2; load it with the release of offpath that saved it"),
        (dict, r"expected the state_dict of a topology, version 1, got one without \['version'\]"),
        (lambda: None, "expected the state_dict of a topology, version 1, got NoneType"),
        (lambda: [1, 2], "expected the state_dict of a topology, version 1, got list"),
        (_put(step=None), "expected step to be a whole number of at least 0, got None"),
        (_put(step=-5), "expected step to be a whole number of at least 0, got -5"),
        (_put(generator=None), "expected the state of a torch.Generator on the CPU, got None"),
        (_put(generator=torch.zeros(10, dtype=torch.uint8)), r"torch.Generator .* got torch.uint8 \(10,\)"),
        (_put(generator=torch.zeros(5056, dtype=torch.uint8)), "torch.Generator .*mt19937"),
        (_put(layers=["0", "2"]), "expected the layers of the state, got list"),
        (_put(layers={"0": None, "2": None}), "expected the state of layer '0', got NoneType"),
        (_not_in_layer("initial_nnz"), r"expected the state of layer '2', got one without \['initial_nnz'\]"),
        (_not_in_layer("digest"), r"got one without \['digest'\]"),
        (_not_in_layer("unmoved"), r"got one without \['unmoved'\]"),
        (_in_layer(initial_nnz="18"), "layer '2': initial_nnz to be a whole number of at least 0, got '18'"),
        (_in_layer(digest=None), "layer '2': digest to be a whole number, got None"),
        (_in_layer(unmoved=None), r"layer '2': unmoved to be a tensor \[n\] in torch.bool, got None"),
        (_in_layer(unmoved=torch.ones(1, 18, dtype=torch.bool)), r"unmoved .* got torch.bool \(1, 18\)"),
        (_in_layer(unmoved=torch.ones(18)), r"unmoved .* got torch.float32 \(18,\)"),
        (_in_layer(unmoved=torch.ones(17, dtype=torch.bool)), "layer '2': expected the connections that were there"),
        (_in_layer(history=[]), "expected the history of layer '2', got list"),
        (_in_layer(history={"rank": 0, "passes": [None]}), r"layer '2': expected passes of a tensor \[..., 10\]"),
        (
            _in_layer(history={"rank": 0, "passes": [(torch.ones(5, 10), torch.ones(5, 9), 1.0)]}),
            r"one \[..., 6\] and a number, got torch.float32 \(5, 10\), torch.float32 \(5, 9\), 1.0",
        ),
    ],
)
def test_the_state_of_another_model_or_recipe_is_refused_and_changes_nothing(state, message: str) -> None:
    topology = _start("SET")[2]
    before = topology.state_dict()
    with pytest.raises(TopologyError, match=message):
        topology.load_state_dict(state())
    after = topology.state_dict()
    assert torch.equal(before.pop("generator"), after.pop("generator")) and str(before) == str(after)


def test_the_bits_of_other_positions_are_refused_and_nothing_changes() -> None:
    model = model_of()
    topology = offpath.SET(model, torch.optim.SGD(model.parameters(), lr=0.1), update_freq=1, record_explored=True)
    state, before = topology.state_dict(), topology.survey()
    state["layers"]["2"]["explored"] = torch.full((3,), 255, dtype=torch.uint8)
    with pytest.raises(
        TopologyError, match=r"layer '2': explored to be a tensor \[8\] in torch.uint8, got torch.uint8 \(3,\)"
    ):
        topology.load_state_dict(state)
    assert topology.survey() == before


def test_passes_that_another_process_saw_are_refused() -> None:
    parts = _start("momentum")
    assert all("history" not in layer for layer in parts[2].state_dict()["layers"].values())
    _run(parts, 1, 3)
    state = parts[2].state_dict()
    assert [len(layer["history"]["passes"]) for layer in state["layers"].values()] == [2, 2]
    state["layers"]["2"]["history"]["rank"] = 1
    with pytest.raises(TopologyError, match="layer '2': expected a state saved by rank 0, got one of rank 1"):
        parts[2].load_state_dict(state)


def test_what_an_update_reports() -> None:
    model, optimizer, topology = _start("SET")
    first, second = (u for u in _run((model, optimizer, topology), 1, 7) if u)
    assert (first.step, second.step) == (3, 6)
    assert [layer.name for layer in first.layers] == ["0", "2"]
    assert first.dropped == first.grown == 11 + 5 and first.nnz == 36 + 18
    assert first.sparsity == 1 - 54 / 180 and first.layers[0].sparsity == 1 - 36 / 120
    assert first.unmoved == 54 - 16 and 54 - 32 <= second.unmoved <= 54 - 16
    assert asdict(first)["layers"][0] == {
        "name": "0", "dropped": 11, "grown": 11, "nnz": 36, "size": 120, "unmoved": 25
    }  # fmt: skip


def test_unmoved_connections_are_those_that_were_never_dropped() -> None:
    model, optimizer, topology = _start("SET")
    held = model[0].pattern.to_mask()
    for step in range(1, 13):
        train_step(model, optimizer, step)
        update = topology.step()
        held &= model[0].pattern.to_mask()
        if update:
            assert update.layers[0].unmoved == int(held.sum())


def test_gmp_reaches_its_sparsity_whatever_the_frequency() -> None:
    for distribution in ("uniform", "erk", "global"):
        model = model_of(density=1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        topology = offpath.GMP(
            model, optimizer, final_sparsity=0.9, end_step=10, update_freq=4, distribution=distribution
        )
        updates = _run((model, optimizer, topology), 1, 13)
        last = updates[9]
        assert [u.step for u in updates if u] == [4, 8, 10]
        assert last is not None and last.nnz == 18 == sum(layer.nnz for layer in (model[0], model[2]))
        densities = {"uniform": [12, 6], "erk": [10, 8]}.get(distribution)
        assert densities is None or [layer.nnz for layer in last.layers] == densities


def test_threshold_drops_what_is_below_and_no_more() -> None:
    model = model_of()
    parts = offpath.topology
    recipe = parts.Recipe(
        "threshold", parts.Every(1), parts.drop.Threshold(0.05), parts.grow.random, parts.PerLayer(parts.Constant(1.0))
    )
    topology = Topology(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe)
    small = [int((layer.values.abs() < 0.05).sum()) for layer in (model[0], model[2])]
    update = topology.step()
    assert update is not None and [layer.dropped for layer in update.layers] == small
    values = model[0].values.detach()
    assert float(values[values != 0].abs().min()) >= 0.05
