"""What a file says of `nn.Sequential`: the model that was saved, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import offpath
from offpath import SparseLinear, StorageError

IMAGES = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
DESCRIBED: dict[str, Callable[[], nn.Module]] = {
    "a module in two places": lambda: _twice(nn.LeakyReLU(2.0)),
    "a layer in two places": lambda: _twice(nn.Linear(7, 7)),
    "a sparse layer in two places": lambda: _twice(SparseLinear(7, 7, sparsity=0.5)),
    "sizes of NumPy": lambda: nn.Sequential(
        nn.Linear(np.int64(7), np.prod((7, 1))),
        SparseLinear(np.int64(7), np.int64(7), sparsity=0.5),
        nn.MaxPool2d((np.int64(2), 2)),
    ),
    "max over the rim": lambda: nn.MaxPool2d(2, ceil_mode=True),
    "dilated max": lambda: nn.MaxPool2d(2, dilation=2),
    "mean over the rim": lambda: nn.AvgPool2d(2, ceil_mode=True),
    "mean without the padding": lambda: nn.AvgPool2d(3, padding=1, count_include_pad=False),
    "mean by another divisor": lambda: nn.AvgPool2d(3, divisor_override=2),
}


def _twice(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(7, 7), module, nn.Linear(7, 7), module)


@pytest.mark.parametrize("name", DESCRIBED)
def test_what_is_described_computes_the_same(tmp_path: Path, name: str) -> None:
    model = DESCRIBED[name]().eval()
    offpath.save(model, tmp_path / "m")
    again = offpath.load(tmp_path / "m")
    assert torch.equal(again(IMAGES), model(IMAGES))
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


def test_the_places_of_pooled_maxima_are_returned_again(tmp_path: Path) -> None:
    offpath.save(nn.MaxPool2d(2, return_indices=True), tmp_path / "m")
    values, indices = offpath.load(tmp_path / "m")(IMAGES)
    assert values.shape == indices.shape


def _linear(change: Callable[[nn.Module], object], layer: nn.Module | None = None) -> nn.Module:
    model = nn.Sequential(nn.Linear(7, 7) if layer is None else layer)
    change(model[0])
    return model


CHANGED: dict[str, Callable[[], nn.Module]] = {
    "hook": lambda: _linear(lambda layer: layer.register_forward_hook(lambda module, inputs, y: 2 * y)),
    "hook of a sparse layer": lambda: _linear(
        lambda layer: layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)), SparseLinear(7, 7)
    ),
    "setting that JSON cannot say": lambda: nn.Sequential(nn.Embedding(9, 4, max_norm=1.0, norm_type=torch.inf)),
    "forward": lambda: _linear(lambda layer: setattr(layer, "forward", lambda x: x)),
    "buffer": lambda: _linear(lambda layer: layer.register_buffer("more", torch.ones(2))),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_a_description_cannot_say_needs_a_model(tmp_path: Path, name: str) -> None:
    model = CHANGED[name]()
    offpath.save(model, tmp_path / "m")
    with pytest.raises(StorageError, match=r"hooks and changed modules are no part of it.*pass model="):
        offpath.load(tmp_path / "m")


def test_a_layer_that_was_cut_by_hand_needs_a_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(7, 7, bias=False), nn.ReLU())
    model[0].weight = nn.Parameter(torch.randn(5, 7))  # out_features still says 7
    offpath.save(model, tmp_path / "m")
    with pytest.raises(StorageError, match="pass model="):
        offpath.load(tmp_path / "m")
    again = nn.Sequential(nn.Linear(7, 5, bias=False), nn.ReLU())
    assert torch.equal(offpath.load(tmp_path / "m", again)(IMAGES), model(IMAGES))


def test_a_buffer_of_the_container_needs_a_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(7, 7))
    model.register_buffer("more", torch.ones(2))
    offpath.save(model, tmp_path / "m")
    with pytest.raises(StorageError, match="pass model="):
        offpath.load(tmp_path / "m")


@pytest.mark.parametrize("name", ["hook", "hook of a sparse layer", "forward"])
def test_a_layer_that_something_hangs_on_is_not_exchanged(tmp_path: Path, name: str) -> None:
    offpath.save(nn.Sequential(SparseLinear(7, 7)), tmp_path / "m")
    model = CHANGED[name]()
    before, layer = model(IMAGES), model[0]
    with pytest.raises(StorageError, match=r"layer '0' to take the place of one that nothing hangs on, but .*attach"):
        offpath.load(tmp_path / "m", model)
    assert model[0] is layer and torch.equal(model(IMAGES), before)
