"""Pruning and compressing run a model many times, and leave what it remembers as it was."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from offpath.convert import compress, prune

X = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)) + 3


class _Normalising(nn.Module):
    """Its running statistics move in evaluation mode as well, and torch counts no write."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(batch_norm(x, self.norm.running_mean, self.norm.running_var, training=True))


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.data += len(x)
        return self.linear(x)


class _Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("cache", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = x.detach().clone()
        self.register_buffer("late", x.detach(), persistent=False)
        return self.linear(x)


class _OnAGraph(nn.Module):
    """Sparse tensors cannot be compared; torch counts what is written into them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("edges", torch.eye(20).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        self.edges.mul_(2.0)
        return self.linear(x)


@pytest.mark.parametrize("run", ["prune", "compress", "compress that fails"])
@pytest.mark.parametrize("make", [_Normalising, _Counting, _Caching, _OnAGraph])
def test_buffers_are_as_they_were(make: type[nn.Module], run: str) -> None:
    model = make()
    prune(model, 0.9)
    before = {name: value.clone() for name, value in model.named_buffers()}
    if run == "prune":
        prune(model, 0.95, "wanda", calibration=[X])
    elif run == "compress":
        compress(model, example=X, goal="size")
    else:
        calls = itertools.count()
        model.register_forward_hook(lambda module, given, y: y + next(calls))  # not the same twice
        with pytest.raises(ValueError, match="Nothing was changed"):
            compress(model, example=X, goal="size")
    after = dict(model.named_buffers())
    after.pop("linear.topology_digest", None)  # of the sparse layer that has taken the place of a dense one
    assert after.keys() == before.keys() and all(
        torch.equal(after[name].to_dense(), before[name].to_dense()) for name in before
    )


def test_inputs_of_inference_mode_that_are_written_over_are_told_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            y = self.a(x)
            x.mul_(torch.tensor([100.0] * 4 + [0.01] * 4))
            return y + self.b(x)

    class Inferring(Twice):
        forward = torch.inference_mode()(Twice.forward)

    weights = []
    for kind in (Twice, Inferring):
        torch.manual_seed(0)
        model = kind()
        prune(model, 0.5, "wanda", calibration=[torch.randn(64, 8)])
        weights.append(model.b.weight)
    assert torch.equal(*weights)
