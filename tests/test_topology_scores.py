"""RigL's scores are the dense gradient, seen in the one step that needs it and never written out."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import offpath
from children import numbers_of
from offpath import SparseLinear
from offpath.topology import TopologyError
from topology_checks import batch_of, check_scores, model_of, momentum_of, rigl, train_step
from topology_oracle import growing_by_momentum


@pytest.mark.parametrize("leading", [(4,), (2, 3), ()])
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("passes", [1, 2])
def test_scores_add_up_over_passes_and_calls(passes: int, calls: int, leading: tuple[int, ...]) -> None:
    check_scores(passes, calls, leading)


def test_hooks_are_there_in_the_step_of_an_update_alone() -> None:
    model = model_of()
    optimizer, topology = rigl(model)
    watched = []
    for step in range(1, 8):
        watched.append(bool(model[0]._forward_hooks))
        train_step(model, optimizer, step)
        topology.step()
    assert watched == [False, False, True, False, False, True, False]


def test_nothing_is_kept_for_a_topology_that_is_gone() -> None:
    """As after a cell of a notebook is run again."""
    model = model_of()
    optimizer, topology = rigl(model, update_freq=1)
    (hook,) = model[0]._forward_hooks.values()
    train_step(model, optimizer, 1)
    assert hook.passes
    del topology
    assert not hook.passes and not model[0]._forward_hooks
    optimizer, topology = rigl(model, update_freq=1)
    train_step(model, optimizer, 2)
    assert topology.step().grown


def test_other_recipes_never_watch() -> None:
    model = model_of()
    offpath.SET(model, torch.optim.SGD(model.parameters(), lr=0.1), update_freq=1)
    assert not model[0]._forward_hooks


def test_momentum_watches_the_steps_that_it_reads() -> None:
    model = model_of()
    optimizer, topology = momentum_of(model)
    watched = []
    for step in range(1, 9):
        watched.append(topology.watching)
        assert bool(model[0]._forward_hooks) == topology.watching
        train_step(model, optimizer, step)
        topology.step()
    assert watched == [False, False, True, True, True, False, False, True]


def test_momentum_remembers_a_batch_that_the_next_one_has_overwritten() -> None:
    patterns = []
    for reuse in (False, True):
        model, buffer = model_of(), torch.empty(5, 12)
        optimizer, topology = momentum_of(model)
        for step in range(1, 6):
            x = torch.randn(5, 12, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(buffer.copy_(x) if reuse else x).square().mean().backward()
            optimizer.step()
            topology.step()
        patterns.append(model[0].pattern)
    assert patterns[0].equals(patterns[1])


def test_momentum_forgets_a_skipped_step_alone() -> None:
    masks = []
    for skips in (False, True):
        model = model_of()
        optimizer, topology = momentum_of(model)
        for step in range(1, 6):
            if skips and step == 4:
                model(torch.randn(5, 12) * torch.inf).sum().backward()
                topology.forget()
            train_step(model, optimizer, step)
            topology.step()
        masks.append(model[0].pattern)
    assert masks[0].equals(masks[1])


def test_passes_of_a_copy_and_passes_without_gradient_do_not_count() -> None:
    models = [model_of() for _ in range(2)]
    for model in models:
        optimizer, topology = rigl(model, update_freq=1)
        train_step(model, optimizer, 1)
        if model is models[1]:
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                train_step(twin, torch.optim.SGD(twin.parameters(), lr=0.1), 2)
            with torch.no_grad():
                model(torch.randn(5, 12))
        topology.step()
    assert models[0][0].pattern.equals(models[1][0].pattern)


def test_x_given_by_name_counts() -> None:
    layer = SparseLinear(6, 5, density=0.4)
    _, topology = rigl(layer, update_freq=1)
    layer(x=torch.randn(3, 6)).sum().backward()
    update = topology.step()
    assert update is not None and update.grown == 4


def test_fused_layers_are_scored_as_others_are() -> None:
    models = [model_of(torch.float64) for _ in range(2)]
    assert offpath.fuse(models[1]) == ["0"]
    for model in models:
        optimizer, topology = rigl(model, update_freq=1)
        train_step(model, optimizer, 1)
        topology.step()
    assert models[0][0].pattern.equals(models[1][0].pattern)


def test_momentum_needs_a_pass_of_the_step_of_the_update_itself() -> None:
    model = model_of()
    optimizer, topology = momentum_of(model)
    for step in range(1, 5):
        train_step(model, optimizer, step)
        topology.step()
    twin, twins_optimizer, twins_topology = copy.deepcopy((model, optimizer, topology))
    train_step(twin, twins_optimizer, 5)
    for unseen in (topology, twins_topology):
        with pytest.raises(TopologyError, match=r"saw none.* copied or unpickled topology .* make it anew"):
            unseen.step()


@pytest.mark.parametrize("recipe", ["RigL", "global", "GMP"])
def test_a_layer_that_is_frozen_on_the_way_stays_until_it_thaws(recipe: str) -> None:
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters())
    topology = {
        "RigL": partial(offpath.RigL, end_step=50),
        "global": partial(offpath.SET, distribution="global"),
        "GMP": partial(offpath.GMP, end_step=50, final_sparsity=0.9, distribution="global"),
    }[recipe](model, optimizer, update_freq=1)
    dropped = []
    for step in range(1, 5):
        model[0].values.requires_grad_(step in (1, 4))
        train_step(model, optimizer, step)
        dropped.append([layer.dropped for layer in topology.step().layers])
    assert [layers[0] > 0 for layers in dropped] == [True, False, False, True]
    assert dropped[1][1] > 0
    model.requires_grad_(False)
    assert topology.step().dropped == 0


@pytest.mark.parametrize("recipe", ["RigL", "MEST", "momentum"])
def test_a_layer_that_the_step_leaves_out_has_a_gradient_of_zero(recipe: str) -> None:
    """As a router or layer drop leave some out."""
    states = []
    for leaves_out in (True, False):
        model = nn.ModuleList([model_of(), model_of(seed=1)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        topology = {
            "RigL": partial(offpath.RigL, end_step=100),
            "MEST": offpath.MEST,
            "momentum": partial(growing_by_momentum, steps=2),
        }[recipe](model, optimizer, update_freq=2)
        for step in (1, 2):
            optimizer.zero_grad()
            loss = model[0](batch_of(step)).square().mean()
            other = model[1](batch_of(step)).square().mean() if step == 1 or not leaves_out else 0.0
            (loss + other * (step == 1)).backward()
            optimizer.step()
            update = topology.step()
        assert update.grown > 0
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_an_update_without_a_pass_is_refused() -> None:
    model = model_of()
    _, topology = rigl(model, update_freq=1)
    with pytest.raises(TopologyError, match="expected a forward and backward pass"):
        topology.step()


@pytest.mark.parametrize("where", ["x", "dy"])
def test_a_gradient_that_is_not_finite_is_refused_and_training_can_go_on(where: str) -> None:
    layer = SparseLinear(6, 5, density=0.4)
    _, topology = rigl(layer, update_freq=1)
    x, dy = torch.randn(3, 6), torch.randn(3, 5)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    {"x": x, "dy": dy}[where][1, 2] = torch.nan
    layer(x).backward(dy)
    with pytest.raises(TopologyError, match="finite scores"):
        topology.step()
    assert topology.step_count == 0
    assert all(torch.equal(value, layer.state_dict()[key]) for key, value in before.items())
    layer(torch.randn(3, 6)).backward(torch.randn(3, 5))
    assert topology.step() is not None


@pytest.mark.long
def test_a_huge_layer_is_made_and_trained_a_step_with_rigl_in_less_than_a_byte_a_position() -> None:
    # What the kernels cost is measured once on a machine, with operands of its own that take as much again.
    offpath.SparseLinear(2048, 2048)(torch.randn(8, 2048))
    size = 16384
    grown, grew_by_bytes = numbers_of(
        "import torch, offpath\n"
        "before = peak_bytes()\n"
        f"layer = offpath.SparseLinear({size}, {size}, sparsity=0.999)\n"
        "optimizer = torch.optim.Adam(layer.parameters())\n"
        "topology = offpath.RigL(layer, optimizer, update_freq=1, end_step=100)\n"
        f"layer(torch.randn(8, {size})).square().sum().backward()\n"
        "optimizer.step()\n"
        "update = topology.step()\n"
        "print(update.grown, peak_bytes() - before)"
    )
    assert grown == round(offpath.topology.Cosine(0.3, 100)(1) * round(size**2 * 0.001))
    assert grew_by_bytes < size**2  # the dense weight alone would take four bytes a position
