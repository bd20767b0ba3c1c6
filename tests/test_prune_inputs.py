"""What calibrated pruning takes for the inputs of a layer, and the layers of which it cannot tell."""

from __future__ import annotations

import accelerate.hooks
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

import offpath

CALIBRATED = ["wanda", "sparsegpt"]


def test_inputs_that_are_no_plain_numbers_are_refused() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.to_sparse())

    with pytest.raises(ValueError, match="'layer' to be fed plain numbers"):
        offpath.prune(Sparse(), 0.5, "wanda", calibration=[torch.randn(2, 8)])


def test_transformer_encoder_layers_call_their_layers_while_somebody_listens() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    report = offpath.prune(nn.TransformerEncoder(layer, 2), 0.5, "wanda", calibration=[torch.randn(3, 5, 16)])
    assert [a.name for a in report.layers] == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    # Attention has a parameter of its own for its inputs, and reads the weight for its outputs without a call.
    left = {f"layers.{i}.self_attn{part}" for i in (0, 1) for part in ("", ".out_proj")}
    assert {name for name, _ in report.skipped} == left


class _Scaled(nn.Linear):
    """Multiplies its weight by something else than its input."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x * torch.arange(self.in_features), self.weight, self.bias)


class _SamePadding(nn.Conv2d):
    """Pads itself, as those of image models do that were trained elsewhere."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d(nn.functional.pad(x, (0, 1, 0, 1)), weight, bias)


def _replaced() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: linear(x.flip(-1), layer.weight, layer.bias)
    return layer


@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (_Scaled(8, 8), torch.randn(5, 8)),
        (_SamePadding(2, 3, 2), torch.randn(2, 2, 5, 5)),
        (_replaced(), torch.randn(5, 8)),
    ],
    ids=["subclass", "convolution", "replaced"],
)
def test_layers_with_a_forward_of_their_own_are_left_to_methods_without_inputs(
    method: str, layer: nn.Module, x: Tensor
) -> None:
    model = nn.Sequential(nn.Identity(), layer, nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    model(x)
    before = layer.weight.clone()
    report = offpath.prune(model, 0.5, method, calibration=[x])
    assert [a.name for a in report.layers] == ["4"] and torch.equal(layer.weight, before)
    assert [name for name, reason in report.skipped if "its own forward may change its inputs" in reason] == ["1"]
    assert [a.name for a in offpath.prune(model, 0.5).layers] == ["1", "4"]


def test_subclasses_that_compute_as_their_class_and_hooks_of_accelerate_are_pruned() -> None:
    class Named(nn.Linear):
        pass

    model, x = nn.Sequential(Named(8, 8), nn.Linear(8, 8)), torch.randn(20, 8)
    twin = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    twin.load_state_dict(model.state_dict())
    accelerate.hooks.add_hook_to_module(model[1], accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    for one in (model, twin):
        assert not offpath.prune(one, 0.5, "wanda", calibration=[x]).skipped
    assert torch.equal(model[0].weight, twin[0].weight) and torch.equal(model[1].weight, twin[1].weight)


def test_layers_without_sizes_are_refused_and_stay_without() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"'1', a LazyLinear, .* call the model once first"):
        offpath.prune(model, 0.5, "wanda", calibration=[torch.randn(3, 8)])
    assert isinstance(model[1].weight, nn.UninitializedParameter)
    assert dict(offpath.prune(model, 0.5).skipped)["1"].endswith("call the model once first")
