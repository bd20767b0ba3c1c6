"""Activation checkpointing runs forward passes again: what they count, and what depends on what was counted."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from offpath import SparseLinear, ops
from offpath.nn import BatchTopK, JumpReLU, KWinners, KWinners2d, SparseAutoencoder

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("make", [lambda: KWinners(8, 0.5), lambda: KWinners2d(8, 0.5)], ids=["KWinners", "KWinners2d"])
def test_winners_are_not_chosen_again_by_a_boost_that_has_moved_on(make, use_reentrant: bool) -> None:
    layer = make()
    x = (X if isinstance(layer, KWinners) else X.view(3, 8, 2, 1)).clone().requires_grad_()
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="Leave it out of what is checkpointed"):
        y.sum().backward()
    layer.eval()
    checkpoint(layer, x, use_reentrant=use_reentrant).sum().backward()
    gradient, x.grad = x.grad, None
    layer(x).sum().backward()
    assert torch.equal(gradient, x.grad)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "make", [lambda: BatchTopK(2, output="dense"), lambda: SparseAutoencoder(8, 16, 2, activation="batch_topk")]
)
def test_samples_are_counted_once(make, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    layer = make()
    state = {name: value.clone() for name, value in layer.state_dict().items()}

    def run(checkpointed: bool) -> tuple[dict[str, Tensor], Tensor | None]:
        layer.load_state_dict(state)
        x = X.clone().requires_grad_()

        def loss(x: Tensor) -> Tensor:
            return layer.loss(x).total if isinstance(layer, SparseAutoencoder) else layer(x).square().sum()

        (checkpoint(loss, x, use_reentrant=use_reentrant) if checkpointed else loss(x)).backward()
        return {name: value.clone() for name, value in layer.state_dict().items()}, x.grad

    (counted, gradient), (expected, expected_gradient) = run(True), run(False)
    assert gradient is not None and torch.equal(gradient, expected_gradient)
    assert counted.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in counted.items())
    assert any(not torch.equal(value, state[name]) for name, value in counted.items())


THRESHOLDS = {
    "JumpReLU": lambda: JumpReLU(8, bandwidth=0.5, threshold=0.3, output="dense"),
    "autoencoder": lambda: SparseAutoencoder(8, 16, 2, activation="jumprelu", bandwidth=0.5),
}


@pytest.mark.parametrize("kind", THRESHOLDS)
def test_thresholds_get_the_same_gradients(kind: str) -> None:
    torch.manual_seed(0)
    layer, gradients = THRESHOLDS[kind](), []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        gradients.append(torch.autograd.grad(run(X).square().sum(), list(layer.parameters())))
    assert all(map(torch.equal, *gradients)) and all(bool(one.any()) for one in gradients[0])


@pytest.mark.parametrize("make", [lambda: BatchTopK(2, output="dense"), lambda: KWinners(8, 0.5)])
def test_what_trains_inside_of_a_backward_pass_is_counted(make) -> None:
    """As in a hook that trains on gradients."""
    layer, twin = make(), make()

    def train(gradient: Tensor) -> None:
        with torch.enable_grad():
            layer(gradient.detach().requires_grad_()).sum().backward()

    h = X.clone().requires_grad_() * 1
    h.register_hook(train)
    (h * X).sum().backward()
    twin(X)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("method", [None, "dense"])
@pytest.mark.parametrize("listens", ["in both passes", "in the second pass"])
def test_a_layer_is_recomputed_where_somebody_listens(method: str | None, listens: str) -> None:
    layer, x = SparseLinear(8, 8, sparsity=0.5), X.clone().requires_grad_()
    with torch.no_grad():
        layer.values.mul_(16).round_()  # whole numbers, whose sums are exact in any order
    methods = {} if method is None else dict.fromkeys(("forward", "dx", "dvalues"), method)
    with ops.forced_methods(**methods):
        layer(x).sum().backward()
        expected, x.grad = x.grad, None
        with FlopCounterMode(display=False) if listens == "in both passes" else nullcontext():
            y = checkpoint(layer, x, use_reentrant=False)
            with FlopCounterMode(display=False):
                y.sum().backward()
    assert torch.equal(x.grad, expected)
