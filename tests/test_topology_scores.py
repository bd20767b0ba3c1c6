"""RigL's scores are the dense gradient, seen in the one step that needs it and never written out."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import offpath
from children import numbers_of
from offpath import SparseLinear
from offpath.topology import TopologyError
from topology_checks import check_scores, model_of, train_step
from topology_oracle import growing_by_momentum


@pytest.mark.parametrize("leading", [(4,), (2, 3), ()])
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("passes", [1, 2])
def test_scores_add_up_over_passes_and_calls(passes: int, calls: int, leading: tuple[int, ...]) -> None:
    check_scores(passes, calls, leading)


def _rigl(model: nn.Module, update_freq: int = 3, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, offpath.RigL(model, optimizer, update_freq=update_freq, end_step=100, **settings)


def test_hooks_are_there_in_the_step_of_an_update_alone() -> None:
    model = model_of()
    optimizer, topology = _rigl(model)
    watched = []
    for step in range(1, 8):
        watched.append(bool(model[0]._forward_hooks))
        train_step(model, optimizer, step)
        topology.step()
    assert watched == [False, False, True, False, False, True, False]


def test_nothing_is_kept_for_a_topology_that_is_gone() -> None:
    """As after a cell of a notebook is run again."""
    model = model_of()
    optimizer, topology = _rigl(model, update_freq=1)
    (hook,) = model[0]._forward_hooks.values()
    train_step(model, optimizer, 1)
    assert hook.passes
    del topology
    assert not hook.passes and not model[0]._forward_hooks
    optimizer, topology = _rigl(model, update_freq=1)
    train_step(model, optimizer, 2)
    assert topology.step().grown


def test_other_recipes_never_watch() -> None:
    model = model_of()
    offpath.SET(model, torch.optim.SGD(model.parameters(), lr=0.1), update_freq=1)
    assert not model[0]._forward_hooks


def _momentum_of(model: nn.Module, steps: int = 3) -> tuple[torch.optim.Optimizer, offpath.topology.Topology]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, growing_by_momentum(model, optimizer, steps, update_freq=5)


def test_momentum_watches_the_steps_that_it_reads() -> None:
    model = model_of()
    optimizer, topology = _momentum_of(model)
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
        optimizer, topology = _momentum_of(model)
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
        optimizer, topology = _momentum_of(model)
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
        optimizer, topology = _rigl(model, update_freq=1)
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
    _, topology = _rigl(layer, update_freq=1)
    layer(x=torch.randn(3, 6)).sum().backward()
    update = topology.step()
    assert update is not None and update.grown == 4


def test_fused_layers_are_scored_as_others_are() -> None:
    models = [model_of(torch.float64) for _ in range(2)]
    assert offpath.fuse(models[1]) == ["0"]
    for model in models:
        optimizer, topology = _rigl(model, update_freq=1)
        train_step(model, optimizer, 1)
        topology.step()
    assert models[0][0].pattern.equals(models[1][0].pattern)


def _batch(seed: int) -> Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))


def _grown_by_rigl(train: Callable[[nn.Sequential], None]) -> list[int]:
    model = model_of()
    optimizer, topology = _rigl(model, update_freq=1)
    train(model)
    optimizer.step()
    assert topology.step().grown > 0
    return [layer.connections.digest() for layer in (model[0], model[2])]


def test_a_buffer_that_is_filled_again_is_scored_as_fresh_batches_are() -> None:
    def train(model: nn.Module, reuse: bool) -> None:
        buffer = torch.empty(5, 12)
        for seed in range(3):
            model(buffer.copy_(_batch(seed)) if reuse else _batch(seed)).square().mean().backward()
        buffer.fill_(torch.nan)  # the next batch, before topology.step()

    assert _grown_by_rigl(partial(train, reuse=True)) == _grown_by_rigl(partial(train, reuse=False))


def test_a_gradient_that_passes_through_to_a_parameter_is_not_added_to() -> None:
    def train(model: nn.Module, shift: bool) -> None:
        bias = nn.Parameter(torch.zeros(5, 6))
        for seed in range(2):
            y = model(_batch(seed))
            (y + bias if shift else y).backward(_batch(9)[:, :6])

    assert _grown_by_rigl(partial(train, shift=True)) == _grown_by_rigl(partial(train, shift=False))


@pytest.mark.parametrize("momentum", [False, True])
def test_an_activation_that_was_written_over_is_refused(momentum: bool) -> None:
    first, body = nn.Linear(12, 12), model_of()
    model = nn.Sequential(first, body)
    _, topology = _momentum_of(model, steps=5) if momentum else _rigl(model, update_freq=1)
    x = first(_batch(0))
    body(x).sum().backward()
    x.detach().zero_()
    with pytest.raises(TopologyError, match=r"layer '1\.0': .* written over; feed the layer .* x\.clone\(\)"):
        topology.step()
    assert topology.step_count == 0
    body(first(_batch(0))).sum().backward()
    topology.step()
    assert topology.step_count == 1


@pytest.mark.parametrize("reads", ["input", "values"])
def test_gradients_that_are_not_accumulated_do_not_count(reads: str) -> None:
    def train(model: nn.Sequential, saliency: bool) -> None:
        if saliency:
            x = _batch(1).requires_grad_()
            torch.autograd.grad(100 * model(x).sum(), x if reads == "input" else model[0].values)
        model(_batch(0)).square().mean().backward()

    assert _grown_by_rigl(partial(train, saliency=True)) == _grown_by_rigl(partial(train, saliency=False))


def test_a_backward_pass_made_twice_counts_twice() -> None:
    def train(model: nn.Module, again: bool) -> None:
        losses = [model(_batch(seed)).square().mean() for seed in (0, 1)]
        losses[0].backward(retain_graph=again)
        (losses[0] if again else model(_batch(0)).square().mean()).backward()
        losses[1].backward()

    assert _grown_by_rigl(partial(train, again=True)) == _grown_by_rigl(partial(train, again=False))


def test_a_functional_call_with_the_layers_own_values_counts() -> None:
    def train(model: nn.Module, functional: bool) -> None:
        computed = {name: parameter * 1 for name, parameter in model.named_parameters()}
        run = partial(torch.func.functional_call, model, computed) if functional else model
        run(_batch(0)).square().mean().backward()

    assert _grown_by_rigl(partial(train, functional=True)) == _grown_by_rigl(partial(train, functional=False))


@pytest.mark.parametrize("first_reads_x", [True, False], ids=["x has a gradient", "x has none"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_losses_of_derivatives_are_scored_by_the_whole_dense_gradient(order: int, first_reads_x: bool) -> None:
    """As physics-informed networks and gradient penalties have them; a dense layer says what the gradient is."""

    def loss_of(model: nn.Module) -> Tensor:
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).double()
        given = nn.Parameter(x) if first_reads_x else model[0](x)
        y = derivative = (model if first_reads_x else model[1:])(given)
        for _ in range(order - 1):
            (derivative,) = torch.autograd.grad(derivative.pow(2).sum(), given, create_graph=True)
        return derivative.square().sum() + y.square().sum()

    model = model_of(torch.float64)
    dense = nn.Sequential(*(m.to_dense() if isinstance(m, SparseLinear) else m for m in model))
    _, topology = _rigl(model, update_freq=1)
    for twin in (model, dense):
        loss_of(twin).backward()
    for managed, linear in zip(topology._managed, dense[::2], strict=True):
        scores = managed.view(topology._generator).gradient_of_rows(0, linear.out_features)
        # Float64 products in another order: relative to the largest, far below what one missing pass would be.
        assert (scores - linear.weight.grad).abs().max() <= 1e-12 * linear.weight.grad.abs().max()


@pytest.mark.parametrize("thrown_away", [100.0, torch.inf], ids=["finite", "infinite"])
def test_a_gradient_that_is_thrown_away_does_not_count(thrown_away: float) -> None:
    def train(model: nn.Sequential, skips: bool) -> None:
        if skips:
            model(_batch(1) * thrown_away).square().sum().backward()
            model.zero_grad()
        model(_batch(0)).square().mean().backward()
        model(_batch(2)).square().mean().backward()

    assert _grown_by_rigl(partial(train, skips=True)) == _grown_by_rigl(partial(train, skips=False))


def test_momentum_needs_a_pass_of_the_step_of_the_update_itself() -> None:
    model = model_of()
    optimizer, topology = _momentum_of(model)
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


@pytest.mark.parametrize("hook", ["of the layer", "of the layer, another shape", "of the output"])
def test_what_hooks_make_of_an_output_counts_in_the_score(hook: str) -> None:
    torch.manual_seed(0)
    layer, first = SparseLinear(20, 12, sparsity=0.5), torch.arange(12) == 0
    if hook.startswith("of the layer"):
        shape = (6, 3, 4) if "shape" in hook else (6, 12)
        layer.register_forward_hook(lambda module, given, y: (y * first).view(shape))
    _, topology = _rigl(layer, update_freq=1, drop_fraction=0.03)
    before = layer.pattern.to_mask()
    y = layer(torch.randn(6, 20))
    if hook == "of the output":
        y.register_hook(lambda gradient: gradient * first)
    (y.view(6, 12) * torch.where(torch.arange(12) == 5, 100, 1)).sum().backward()
    assert topology.step().grown
    assert (layer.pattern.to_mask() & ~before).nonzero()[:, 0].tolist() == [0] * 4  # others have no gradient


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
            loss = model[0](_batch(step)).square().mean()
            other = model[1](_batch(step)).square().mean() if step == 1 or not leaves_out else 0.0
            (loss + other * (step == 1)).backward()
            optimizer.step()
            update = topology.step()
        assert update.grown > 0
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_an_update_without_a_pass_is_refused() -> None:
    model = model_of()
    _, topology = _rigl(model, update_freq=1)
    with pytest.raises(TopologyError, match="expected a forward and backward pass"):
        topology.step()


def test_a_compiled_model_has_the_topology_of_an_eager_one() -> None:
    models = [model_of() for _ in range(2)]
    for model in models:
        optimizer, topology = _rigl(model, update_freq=2)
        run = torch.compile(model, backend="aot_eager") if model is models[1] else model
        for step in range(1, 6):
            with torch.compiler.set_stance("force_eager" if topology.watching else "default"):
                train_step(run, optimizer, step)
            topology.step()
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_a_compiled_model_that_runs_compiled_when_watched_is_refused() -> None:
    model = model_of()
    optimizer, topology = _rigl(model, update_freq=2)
    run = torch.compile(model, backend="aot_eager")
    train_step(run, optimizer, 1)
    topology.step()
    train_step(run, optimizer, 2)
    with pytest.raises(TopologyError, match=r"must run uncompiled while topology\.watching"):
        topology.step()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_activations_count_once(use_reentrant: bool) -> None:
    models = [model_of() for _ in range(2)]
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for model in models:
        _, topology = _rigl(model, update_freq=1)
        y = checkpoint(model, x, use_reentrant=use_reentrant) if model is models[1] else model(x)
        y.sum().backward()
        topology.step()
    assert models[0][0].pattern.equals(models[1][0].pattern)


@pytest.mark.parametrize("where", ["x", "dy"])
def test_a_gradient_that_is_not_finite_is_refused_and_training_can_go_on(where: str) -> None:
    layer = SparseLinear(6, 5, density=0.4)
    _, topology = _rigl(layer, update_freq=1)
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
