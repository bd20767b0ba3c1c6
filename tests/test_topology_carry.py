"""What belongs to a connection goes with it: in every optimizer, dtype and recipe, and in averaged models."""

from __future__ import annotations

import pickle
from collections import deque
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing  # teaches ForkingPickler to share tensors
from hypothesis import given, strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import offpath
from offpath import SparseLinear
from offpath.topology import Topology, TopologyError
from topology_checks import OPTIMIZERS, Ascending, check_average, check_update, model_of, train_step

MAKERS = {
    "SET": lambda m, o: offpath.SET(m, o, update_freq=4),
    "RigL": lambda m, o: offpath.RigL(m, o, update_freq=4, end_step=100),
    "MEST": lambda m, o: offpath.MEST(m, o, update_freq=4),
    "GMP": lambda m, o: offpath.GMP(m, o, final_sparsity=0.9, update_freq=4, end_step=8),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("recipe", ["RigL", "GMP"])
def test_state_of_every_optimizer_moves_with_its_weight(recipe: str, optimizer: str) -> None:
    check_update(MAKERS[recipe], OPTIMIZERS[optimizer])


@pytest.mark.parametrize("recipe", MAKERS)
def test_bfloat16_layers(recipe: str) -> None:
    check_update(MAKERS[recipe], OPTIMIZERS["Adam"], torch.bfloat16)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("decay", [None, 0.9, 0.9999])
def test_averaged_models_move_along(decay: float | None, use_buffers: bool) -> None:
    check_average(decay, use_buffers)


# Buffers that follow slowly show it after a few updates.
@pytest.mark.parametrize(("use_buffers", "decay"), [(False, 0.9999), (True, 0.99)])
def test_an_averaged_model_that_nobody_named_is_refused_once_it_has_other_connections(
    use_buffers: bool, decay: float
) -> None:
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=use_buffers)
    topology = offpath.SET(model, optimizer, update_freq=2)
    for step in (1, 2, 3):
        train_step(model, optimizer, step)
        average.update_parameters(model)
        if step < 3:
            average(torch.randn(5, 12))
        topology.step()
    with pytest.raises(RuntimeError, match=r"averaged .* named in also=\[\.\.\.\]"):
        average(torch.randn(5, 12))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999])
def test_a_digest_outlives_any_number_of_averages(decay: float) -> None:
    model = model_of()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(2000):
        average.update_parameters(model)
    average(torch.randn(5, 12))


def test_a_process_that_shares_the_memory_of_a_layer_hears_that_its_connections_moved() -> None:
    model = model_of().share_memory()
    other = pickle.loads(bytes(ForkingPickler.dumps(model)))  # what a process has that gets the model
    optimizer = torch.optim.Adam(model.parameters())
    topology = offpath.SET(model, optimizer, update_freq=1)
    train_step(model, optimizer, 1)
    x = torch.ones(1, 12)
    assert torch.equal(other(x), model(x))
    topology.step()
    with pytest.raises(RuntimeError, match="the topologies differ"):
        other(x)


def test_an_optimizer_with_one_state_for_all_is_refused() -> None:
    model = model_of()
    optimizer = torch.optim.LBFGS([nn.Parameter(torch.zeros(3)), *model.parameters()])
    with pytest.raises(TopologyError, match="LBFGS, which keeps one flat history"):
        offpath.SET(model, optimizer)
    offpath.Static(model, optimizer)


def test_a_grown_connection_starts_as_the_optimizer_starts_a_weight() -> None:
    for optimizer_class, key, options, start in (
        (torch.optim.Adagrad, "sum", {"initial_accumulator_value": 0.5}, 0.5),
        (torch.optim.Rprop, "step_size", {"lr": 0.25}, 0.25),
    ):
        model = model_of()
        optimizer = optimizer_class(model.parameters(), **options)
        topology = offpath.SET(model, optimizer, update_freq=1)
        train_step(model, optimizer, 1)
        grown = _grown_entries(topology, model[0], optimizer, key)
        assert grown.tolist() == [start] * 11


def test_the_user_may_say_with_what_state_a_connection_begins() -> None:
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters())
    topology = offpath.SET(model, optimizer, update_freq=1, grown_state={"exp_avg_sq": 2.0})
    train_step(model, optimizer, 1)
    assert _grown_entries(topology, model[0], optimizer, "exp_avg_sq").tolist() == [2.0] * 11


def test_a_connection_may_begin_with_the_mean_of_its_layer() -> None:
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters())
    topology = offpath.SET(model, optimizer, update_freq=1, grown_state={"exp_avg_sq": "mean"})
    train_step(model, optimizer, 1)
    mean = float(optimizer.state[model[0].values]["exp_avg_sq"].double().mean())
    grown = _grown_entries(topology, model[0], optimizer, "exp_avg_sq")
    assert mean > 0 and grown.tolist() == [float(torch.tensor(mean))] * 11
    for begin in ("median", torch.nan, -torch.inf, None):
        with pytest.raises(TopologyError, match=f'a finite number or "mean", got {begin!r}'):
            offpath.SET(model, optimizer, update_freq=1, grown_state={"exp_avg_sq": begin})


@pytest.mark.parametrize("key", ["exp_avg_sqq", "step"])
def test_a_state_that_the_optimizer_does_not_keep_of_connections_is_refused(key: str) -> None:
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters())
    topology = offpath.SET(model, optimizer, update_freq=2, grown_state={key: 1.0})
    train_step(model, optimizer, 1)
    assert topology.step() is None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = topology.state_dict()["generator"]
    with pytest.raises(TopologyError, match=rf"\('exp_avg', 'exp_avg_sq'\), got '{key}'"):
        topology.step()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert topology.step_count == 1 and torch.equal(topology.state_dict()["generator"], drawn)


def test_grown_state_waits_for_an_optimizer_that_has_none_yet() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    topology = offpath.SET(model, optimizer, update_freq=1, grown_state={"momentum_buffer": 1.0})
    assert topology.step() is not None, "before the optimizer's first step there is nothing to carry"
    train_step(model, optimizer, 1)
    assert _grown_entries(topology, model[0], optimizer, "momentum_buffer").tolist() == [1.0] * 11


def _grown_entries(topology: Topology, layer: SparseLinear, optimizer: torch.optim.Optimizer, key: str) -> Tensor:
    before = layer.pattern.to_mask()
    topology.step()
    grown = layer.pattern.to_mask() & ~before
    return layer.pattern.to_dense(optimizer.state[layer.values][key])[grown]


@given(st.sampled_from(list(MAKERS)), st.integers(0, 2**31), st.floats(0.05, 0.95), st.sampled_from([0.2, 0.4]))
def test_counts_are_kept_and_a_seed_gives_one_topology(recipe: str, seed: int, fraction: float, density: float) -> None:
    options = {"end_step": 100} | ({"final_sparsity": 0.85} if recipe == "GMP" else {"drop_fraction": fraction})
    runs = []
    for _ in range(2):
        model, before = model_of(density=density), torch.get_rng_state()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        topology = getattr(offpath, recipe)(model, optimizer, update_freq=1, seed=seed, **options)
        nnz = [layer.nnz for layer in (model[0], model[2])]
        for step in (1, 2):
            train_step(model, optimizer, step)
            update = topology.step()
            assert update is not None
            if recipe != "GMP":
                assert [layer.nnz for layer in update.layers] == nnz
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_a_layer_called_twice_and_a_model_shared_in_two_places_are_one_layer() -> None:
    layer = SparseLinear(8, 8, density=0.5)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    topology = offpath.SET(model, torch.optim.SGD(model.parameters(), lr=0.1), update_freq=1)
    assert topology.layer_names == ("0",)


class Slotted:
    __slots__ = ("momentum",)

    def __init__(self, momentum: Tensor) -> None:
        self.momentum = momentum


UNMOVABLE = (
    torch.zeros(3, 2),
    [torch.zeros(3)],
    {"a": torch.zeros(36, 2)},
    deque([torch.zeros(36)]),
    SimpleNamespace(graft=SimpleNamespace(momentum=torch.zeros(36))),
    Slotted(torch.zeros(36)),
)


@pytest.mark.parametrize("entry", UNMOVABLE)
def test_state_that_cannot_follow_is_refused_and_nothing_changes(entry: object) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = offpath.SET(model, optimizer, update_freq=1)
    optimizer.state[model[2].values]["history"] = entry
    train_step(model, optimizer, 1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(TopologyError, match="layer '2': expected the state 'history' of SGD"):
        topology.step()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_a_state_that_is_not_kept_by_its_weight_is_refused() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = offpath.SET(model, optimizer, update_freq=1)
    train_step(model, optimizer, 1)
    optimizer.state["trac"] = {weight: weight.detach().clone() for weight in model.parameters()}
    with pytest.raises(TopologyError, match=r"layer '0': expected SGD to keep .* in the state of that .*under 'trac'"):
        topology.step()
    optimizer.state["trac"] = dict.fromkeys(model.parameters(), "a name")
    weight = model[0].values
    optimizer.state[weight]["beside"] = SimpleNamespace(step=torch.tensor(3.0), of=weight, by=optimizer, module=torch)
    assert topology.step().grown > 0


def test_an_optimizer_with_one_state_for_all_is_refused_inside_another_as_well() -> None:
    model = model_of()
    with pytest.raises(TopologyError, match="got LBFGS"):
        offpath.SET(model, Ascending(torch.optim.LBFGS(model.parameters())))


def test_values_that_the_optimizer_has_lost_are_refused_when_they_would_move() -> None:
    model = model_of()
    topology = offpath.SET(model, torch.optim.Adam(model.parameters()), update_freq=1)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(TopologyError, match="layer '0': expected values that the topology's optimizer still holds"):
        topology.step()
    assert topology.step_count == 0


def test_a_state_on_another_device_is_refused_before_anything_moves() -> None:
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters())
    topology = offpath.SET(model, optimizer, update_freq=1)
    train_step(model, optimizer, 1)
    masks = [model[place].pattern.to_mask() for place in (0, 2)]
    state = optimizer.state[model[2].values]
    state["exp_avg"] = state["exp_avg"].to("meta")
    with pytest.raises(TopologyError, match=r"layer '2': expected the state 'exp_avg' of Adam on cpu, .* on meta"):
        topology.step()
    assert all(torch.equal(model[place].pattern.to_mask(), mask) for place, mask in zip((0, 2), masks, strict=True))


class _Net(nn.Module):
    """A frozen backbone with a layer of the same last name as the one that is trained."""

    def __init__(self, sparsity: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.backbone = nn.ModuleDict({"head": SparseLinear(16, 16, sparsity=sparsity, generator=generator)})
        self.backbone.requires_grad_(False)
        self.head = SparseLinear(16, 16, sparsity=sparsity, generator=generator)


@pytest.mark.parametrize("sparsity", [0.0, 0.8], ids=["equal patterns", "other patterns"])
def test_the_copy_is_found_among_layers_of_the_same_last_name(sparsity: float) -> None:
    net = _Net(sparsity)
    average = AveragedModel(net)
    optimizer = torch.optim.Adam(net.head.parameters())
    settings = {"final_sparsity": 0.9, "end_step": 1, "update_freq": 1}
    offpath.GMP(net, optimizer, also=[average], **settings).step()
    before = round(256 * (1 - sparsity))
    assert (average.module.backbone["head"].nnz, average.module.head.nnz) == (before, net.head.nnz)
    assert net.head.nnz < before
    with pytest.raises(TopologyError, match="expected each copy of the model once in also"):
        offpath.GMP(net, optimizer, also=[average, average.module], **settings)
