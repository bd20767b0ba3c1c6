"""`compress` on convolutions: each kind swapped or left by name, its inputs told by the example alone."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import offpath
from offpath import compress
from offpath.nn import SparseConv1d, SparseConv2d

COMPRESS, CONTEST, FINISH = (
    importlib.import_module(f"offpath.convert.compress.{m}") for m in ("compress", "contest", "finish")
)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONTEST, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(FINISH, "ROUNDS", 1)
    # Layers this small gain nothing: neither clock nor size is to decide here.
    monkeypatch.setattr(COMPRESS, "decide", lambda *_: (True, "for the test"))


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding="valid", bias=False),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 32, 3, padding="same", dilation=2, groups=4),
        nn.Conv2d(32, 8, 1),
        nn.Flatten(),
        nn.LazyLinear(10),
    )
    network(torch.randn(2, 3, 12, 12))
    offpath.prune(network, 0.8)
    return network.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_convolutional_network_computes_the_same(layout: torch.memory_format, dtype: torch.dtype) -> None:
    network = _network().to(dtype)
    x = torch.randn(2, 3, 12, 12).to(dtype).contiguous(memory_format=layout)
    with torch.no_grad():
        before = network(x)
        report = compress(network, example=x, filter_fn=lambda module, name: name != "5")
        after = network(x)
    assert [(layer.kind, layer.becomes) for layer in report.layers[:1]] == [("Conv2d", "SparseConv2d")]
    assert [type(network[i]) for i in (0, 2, 4, 5)] == [SparseConv2d, SparseConv2d, SparseConv2d, nn.Conv2d]
    assert report.end_to_end is not None and report.end_to_end.difference <= report.end_to_end.bound
    assert float((after - before).double().norm() / before.double().norm()) == report.end_to_end.difference


def test_one_dimension_a_mask_and_a_single_image() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(4, 8, 5, padding=2), nn.Tanh(), nn.Conv1d(8, 4, 3))
    for layer in (network[0], network[2]):
        prune.random_unstructured(layer, "weight", 0.75)
    x = torch.randn(4, 20)
    before = network(x)
    report = compress(network, example=x, min_sparsity=0.7)
    assert [type(network[i]) for i in (0, 2)] == [SparseConv1d, SparseConv1d]
    assert report.end_to_end is not None and [layer.measured[0].tokens for layer in report.layers] == [20, 20]
    assert report.end_to_end.difference <= report.end_to_end.bound
    torch.testing.assert_close(network(x), before)
    network(x).sum().backward()
    assert network[0].values.grad is not None


def test_without_an_example_and_with_other_padding_convolutions_stay_and_say_why() -> None:
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"))
    offpath.prune(network, 0.9)
    report = compress(network)
    assert dict(report.skipped) == {
        "0": "how large its images are only an example tells; give example=",
        "1": "it pads with 'reflect', a sparse convolution with zeros; pad in a layer before it",
    }
    assert not report.layers and all(type(layer) is nn.Conv2d for layer in network)


def test_a_wrong_convolution_is_found_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network, forward = _network(), SparseConv2d.forward

    def off_by_little(layer: SparseConv2d, x: torch.Tensor) -> torch.Tensor:
        y = forward(layer, x)
        y[0, 0, 0, 0] += 1e-3 * y.abs().max()
        return y

    monkeypatch.setattr(SparseConv2d, "forward", off_by_little)
    with pytest.raises(RuntimeError, match=r"layer '0': the sparse layer's output is off"):
        compress(network, example=torch.randn(2, 3, 12, 12))
    assert not any(isinstance(layer, SparseConv2d) for layer in network)
