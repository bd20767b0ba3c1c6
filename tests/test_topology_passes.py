"""Which backward passes count in a score, however they come about: buffers, hooks, recomputation, compilation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import offpath
from offpath import SparseLinear
from offpath.topology import TopologyError
from topology_checks import batch_of, model_of, momentum_of, rigl, train_step


def _grown_by_rigl(train: Callable[[nn.Sequential], None]) -> list[int]:
    model = model_of()
    optimizer, topology = rigl(model, update_freq=1)
    train(model)
    optimizer.step()
    assert topology.step().grown > 0
    return [layer.connections.digest() for layer in (model[0], model[2])]


def test_a_buffer_that_is_filled_again_is_scored_as_fresh_batches_are() -> None:
    def train(model: nn.Module, reuse: bool) -> None:
        buffer = torch.empty(5, 12)
        for seed in range(3):
            model(buffer.copy_(batch_of(seed)) if reuse else batch_of(seed)).square().mean().backward()
        buffer.fill_(torch.nan)  # the next batch, before topology.step()

    assert _grown_by_rigl(partial(train, reuse=True)) == _grown_by_rigl(partial(train, reuse=False))


def test_a_gradient_that_passes_through_to_a_parameter_is_not_added_to() -> None:
    def train(model: nn.Module, shift: bool) -> None:
        bias = nn.Parameter(torch.zeros(5, 6))
        for seed in range(2):
            y = model(batch_of(seed))
            (y + bias if shift else y).backward(batch_of(9)[:, :6])

    assert _grown_by_rigl(partial(train, shift=True)) == _grown_by_rigl(partial(train, shift=False))


@pytest.mark.parametrize("momentum", [False, True])
def test_an_activation_that_was_written_over_is_refused(momentum: bool) -> None:
    first, body = nn.Linear(12, 12), model_of()
    model = nn.Sequential(first, body)
    _, topology = momentum_of(model, steps=5) if momentum else rigl(model, update_freq=1)
    x = first(batch_of(0))
    body(x).sum().backward()
    x.detach().zero_()
    with pytest.raises(TopologyError, match=r"layer '1\.0': .* written over; feed the layer .* x\.clone\(\)"):
        topology.step()
    assert topology.step_count == 0
    body(first(batch_of(0))).sum().backward()
    topology.step()
    assert topology.step_count == 1


@pytest.mark.parametrize("reads", ["input", "values"])
def test_gradients_that_are_not_accumulated_do_not_count(reads: str) -> None:
    def train(model: nn.Sequential, saliency: bool) -> None:
        if saliency:
            x = batch_of(1).requires_grad_()
            torch.autograd.grad(100 * model(x).sum(), x if reads == "input" else model[0].values)
        model(batch_of(0)).square().mean().backward()

    assert _grown_by_rigl(partial(train, saliency=True)) == _grown_by_rigl(partial(train, saliency=False))


def test_a_backward_pass_made_twice_counts_twice() -> None:
    def train(model: nn.Module, again: bool) -> None:
        losses = [model(batch_of(seed)).square().mean() for seed in (0, 1)]
        losses[0].backward(retain_graph=again)
        (losses[0] if again else model(batch_of(0)).square().mean()).backward()
        losses[1].backward()

    assert _grown_by_rigl(partial(train, again=True)) == _grown_by_rigl(partial(train, again=False))


def test_a_functional_call_with_the_layers_own_values_counts() -> None:
    def train(model: nn.Module, functional: bool) -> None:
        computed = {name: parameter * 1 for name, parameter in model.named_parameters()}
        run = partial(torch.func.functional_call, model, computed) if functional else model
        run(batch_of(0)).square().mean().backward()

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
    _, topology = rigl(model, update_freq=1)
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
            model(batch_of(1) * thrown_away).square().sum().backward()
            model.zero_grad()
        model(batch_of(0)).square().mean().backward()
        model(batch_of(2)).square().mean().backward()

    assert _grown_by_rigl(partial(train, skips=True)) == _grown_by_rigl(partial(train, skips=False))


@pytest.mark.parametrize("hook", ["of the layer", "of the layer, another shape", "of the output"])
def test_what_hooks_make_of_an_output_counts_in_the_score(hook: str) -> None:
    torch.manual_seed(0)
    layer, first = SparseLinear(20, 12, sparsity=0.5), torch.arange(12) == 0
    if hook.startswith("of the layer"):
        shape = (6, 3, 4) if "shape" in hook else (6, 12)
        layer.register_forward_hook(lambda module, given, y: (y * first).view(shape))
    _, topology = rigl(layer, update_freq=1, drop_fraction=0.03)
    before = layer.pattern.to_mask()
    y = layer(torch.randn(6, 20))
    if hook == "of the output":
        y.register_hook(lambda gradient: gradient * first)
    (y.view(6, 12) * torch.where(torch.arange(12) == 5, 100, 1)).sum().backward()
    assert topology.step().grown
    assert (layer.pattern.to_mask() & ~before).nonzero()[:, 0].tolist() == [0] * 4  # others have no gradient


def test_a_compiled_model_has_the_topology_of_an_eager_one() -> None:
    models = [model_of() for _ in range(2)]
    for model in models:
        optimizer, topology = rigl(model, update_freq=2)
        run = torch.compile(model, backend="aot_eager") if model is models[1] else model
        for step in range(1, 6):
            with torch.compiler.set_stance("force_eager" if topology.watching else "default"):
                train_step(run, optimizer, step)
            topology.step()
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_a_compiled_model_that_runs_compiled_when_watched_is_refused() -> None:
    model = model_of()
    optimizer, topology = rigl(model, update_freq=2)
    run = torch.compile(model, backend="aot_eager")
    train_step(run, optimizer, 1)
    topology.step()
    train_step(run, optimizer, 2)
    with pytest.raises(TopologyError, match=r"must run uncompiled while topology\.watching"):
        topology.step()


def test_a_compiled_model_calls_its_layers_as_it_did_before(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4))
    compiled = torch.compile(model, backend="aot_eager")
    report = offpath.sparsify(compiled, 0.5, filter_fn=lambda module, name: name != "2")
    assert [layer.name for layer in report.layers] == ["0"] and isinstance(model[2], nn.Linear)
    topologies = [rigl(one, update_freq=2)[1] for one in (model, compiled)]
    assert topologies[0].layer_names == topologies[1].layer_names == ("0",)
    topologies[0].load_state_dict(topologies[1].state_dict())


def test_gradients_are_heard_of_after_a_load_that_swaps_parameters() -> None:
    """Whose hooks torch takes along and calls no more (torch.utils.swap_tensors)."""
    models = [model_of() for _ in range(2)]
    for model in models:
        optimizer, topology = rigl(model, update_freq=2)
        train_step(model, optimizer, 1)
        topology.step()
        torch.__future__.set_swap_module_params_on_conversion(model is models[1])
        try:
            model.load_state_dict(copy.deepcopy(model.state_dict()))
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        train_step(model, optimizer, 2)
        assert topology.step().grown
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_activations_count_once(use_reentrant: bool) -> None:
    models = [model_of() for _ in range(2)]
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for model in models:
        _, topology = rigl(model, update_freq=1)
        y = checkpoint(model, x, use_reentrant=use_reentrant) if model is models[1] else model(x)
        y.sum().backward()
        topology.step()
    assert models[0][0].pattern.equals(models[1][0].pattern)


def test_what_is_copied_while_a_topology_watches_is_a_model_as_any_other(tmp_path: Path) -> None:
    model = nn.Sequential(SparseLinear(8, 6, sparsity=0.5), nn.ReLU(), SparseLinear(6, 4, sparsity=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = offpath.RigL(model, optimizer, update_freq=1, end_step=100)
    x = torch.randn(3, 8)
    model(x).sum().backward()
    assert model[0]._forward_hooks and model[0].values._post_accumulate_grad_hooks
    for watched in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        offpath.save(watched, tmp_path / "model.safetensors")
        assert torch.equal(offpath.load(tmp_path / "model.safetensors")(x), model(x))
        offpath.load(tmp_path / "model.safetensors", copy.deepcopy(watched))
    copied = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"one watches '0' for its next update; call topology\.close\(\) first"):
        offpath.densify(model)
    with pytest.raises(offpath.StorageError, match=r"a topology watches it for its next update; call topology\.close"):
        offpath.load(tmp_path / "model.safetensors", model)
    topology.close()
    assert len(offpath.densify(copied).layers) == 2
    model[0].register_forward_hook(lambda *_: None)
    assert "it carries hooks" in str(offpath.densify(model))
