"""`compress`: what it leaves alone and what it refuses, which leaves the model as it was."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from compress_cases import CONTEST, few_rounds as few_rounds, pruned_model, same, set_to_zero, snapshot
from offpath import SparseLinear, compress
from offpath.convert.compress.example import differences
from offpath.nn import Int8SparseLinear


def test_layers_that_cannot_be_swapped_are_left_and_named() -> None:
    model = nn.ModuleDict(
        {
            "head": nn.Linear(16, 32),
            "embedding": nn.Embedding(32, 16),
            "hooked": nn.Linear(16, 16),
            "adapted": nn.Linear(16, 16),
            "float16": nn.Linear(16, 16).half(),
            "empty": nn.Linear(16, 16),
            "sparse": SparseLinear(16, 16),
            "attention": nn.MultiheadAttention(16, 2),
            "lazy": nn.LazyLinear(4),
            "normed": nn.Linear(16, 16),
            "tied": nn.Linear(16, 16),
            "tied too": nn.Linear(16, 16),
        }
    )
    for module in model.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, nn.LazyLinear) and module.weight.numel():
            set_to_zero(module.weight)
    model["empty"].weight = nn.Parameter(torch.empty(0, 16))
    model["embedding"].weight = model["head"].weight
    model["hooked"].register_forward_hook(lambda *_: None)
    model["adapted"].register_buffer("scale", torch.ones(16))
    prune.identity(model["tied"], "weight")
    prune.identity(model["tied too"], "weight")
    model["tied too"].weight_orig = model["tied"].weight_orig
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model["normed"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that these will move
        model["quantised"] = torch.ao.nn.quantized.dynamic.Linear(16, 16)
    before = {name: id(module) for name, module in model.named_modules()}
    report = compress(model, goal="size")
    reasons = dict(report.skipped)
    for name, words in {
        "head": "tied to another module",
        "hooked": "hooks",
        "adapted": "it holds scale besides its weight and bias",
        "float16": "no kernel computes in torch.float16",
        "empty": "holds nothing",
        "sparse": "sparse already",
        "attention.out_proj": "whose owner may read its weight",
        "lazy": "it is a LazyLinear",
        "normed": "computed by something other",
        "tied": "tied to another module",
        "tied too": "tied to another module",
        "quantised": "it is quantised",
    }.items():
        assert words in reasons[name], (name, reasons[name])
    assert report.layers == () and before == {name: id(module) for name, module in model.named_modules()}


def _on_meta(model: nn.Module) -> None:
    model[0].to("meta")


def _wrong_mask(model: nn.Module) -> None:
    prune.l1_unstructured(model[2][0], "weight", 0.9)
    model[2][0].weight_mask = torch.ones(3, 3)


@pytest.mark.parametrize(
    ("change", "arguments", "error", "message"),
    [
        (_on_meta, {}, ValueError, "layer '0' on meta; load its weights"),
        (_wrong_mask, {}, ValueError, r"weight_mask of layer '2.0' .* \(64, 128\), got \(3, 3\)"),
        (lambda m: m[0].weight.data.view(-1)[5:6].fill_(math.nan), {}, ValueError, "NaN or infinity in layer '0'"),
        (lambda m: m[0].weight.data.view(-1)[5:6].fill_(-math.inf), {}, ValueError, "NaN or infinity in layer '0'"),
        (lambda m: m[0].bias.data[5:6].fill_(math.nan), {}, ValueError, "finite bias, .* in layer '0'"),
        (None, {"example": [1, 2]}, TypeError, "got list"),
        (None, {"example": torch.randn(2, 3)}, RuntimeError, "mat1 and mat2"),
        (None, {"example": torch.randn(2, 96), "batch": 1}, ValueError, "got both"),
        (None, {"batch": 0}, ValueError, "at least 1, got 0"),
        (None, {"batch": 2.5}, ValueError, "at least 1, got 2.5"),
        (None, {"batch": True}, ValueError, "at least 1, got True"),
        (None, {"filter_fn": ["0"]}, ValueError, r"function of \(module, name\), got list"),
        (None, {"min_sparsity": "0.5"}, ValueError, r"in \(0, 1\), got '0.5'"),
        (None, {"example": torch.randn(0, 96), "goal": "size"}, ValueError, "finite numbers among what the model"),
        (None, {"example": torch.full((2, 96), math.nan), "goal": "size"}, ValueError, "got none. Check the example"),
        (None, {"min_sparsity": 1.0}, ValueError, "min_sparsity in"),
        (None, {"goal": "best"}, ValueError, "'speed' or 'size', got 'best'"),
        (None, {"precision": "int4"}, ValueError, "None or 'int8', got 'int4'"),
        (None, {"embeddings": "int4"}, ValueError, "None or 'int8', got 'int4'"),
    ],
)
def test_refusals_name_what_is_wrong_and_change_nothing(change, arguments, error, message) -> None:
    model = pruned_model()
    if change is not None:
        change(model)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        compress(model, **arguments)
    assert same(before, snapshot(model))


def test_a_filter_that_takes_nothing_is_told_of() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    report = compress(model, batch=1, filter_fn=lambda module, name: False)
    assert str(report).startswith("filter_fn took none of the 2 layers") and "mostly zero" not in str(report)
    some = compress(model, batch=1, filter_fn=lambda module, name: name == "2")
    assert str(some).startswith("no layer that can be swapped is mostly zero") and some.left_out == 1


def test_a_bare_layer_and_what_is_no_module_are_refused() -> None:
    with pytest.raises(ValueError, match="from_dense"):
        compress(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="got str"):
        compress("model.safetensors")


def test_autocast_is_refused_and_inference_mode_leaves_no_trace() -> None:
    model, x = pruned_model(), torch.randn(3, 96)
    before = snapshot(model)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"outside of torch\.autocast"):
        compress(model, example=x)
    assert same(before, snapshot(model))
    with torch.inference_mode():
        compress(model, example=x, goal="size")
    assert type(model[0]) is SparseLinear
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("precision", [None, "int8"])
def test_a_model_that_asks_for_autocast_itself_is_compressed(precision: str | None) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = pruned_model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    model, x = Cast(), torch.randn(3, 96)
    with torch.no_grad():
        before = model(x).double()
    whole = compress(model, example=x, goal="size", precision=precision).end_to_end
    swapped = SparseLinear if precision is None else Int8SparseLinear
    assert type(model.inner[0]) is type(model.inner[2][0]) is swapped and whole is not None
    with torch.no_grad():
        difference = model(x).double() - before
    assert float(difference.norm() / before.norm()) <= whole.bound


def test_a_model_that_was_built_in_inference_mode_is_compressed() -> None:
    with torch.inference_mode():
        model, x = pruned_model(), torch.randn(3, 96)
        before = model(x).double()
    whole = compress(model, example=x, goal="size").end_to_end
    assert type(model[0]) is SparseLinear and whole is not None
    with torch.no_grad():
        assert float((model(x).double() - before).norm() / before.norm()) <= whole.bound


class _Odd(nn.Module):
    """A sparse layer in a model whose `forward` is given."""

    def __init__(self, forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.calls, self._forward = nn.Linear(64, 64), 0, forward
        set_to_zero(self.layer.weight)

    def forward(self, x: torch.Tensor) -> object:
        self.calls += 1
        return self._forward(self, x)


@dataclass
class _Output:
    y: torch.Tensor


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: m.layer(x.add_(1)), "it changes the example in place"),
        (lambda m, x: m.layer(x) * m.calls, "keeps a state such as a cache"),
        (lambda m, x: [m.layer(x) for _ in range(m.calls % 3 + 1)][-1], "calls its layers as often"),
        (lambda m, x: SimpleNamespace(y=m.layer(x)), "finite numbers among what the model returns"),
    ],
)
def test_models_whose_outputs_cannot_be_compared_are_refused(forward, message) -> None:
    model = _Odd(forward)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        compress(model, example=torch.randn(5, 64), goal="size")
    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: nn.functional.dropout(m.layer(x + torch.randn_like(x))),  # in evaluation mode, too
        lambda m, x: _Output(m.layer(x)),
        lambda m, x: m.layer(torch.cat([m.layer(x[:0]), m.layer(x)])),  # an expert that gets no token
    ],
)
def test_random_numbers_dataclasses_and_calls_with_nothing_are_no_obstacle(forward) -> None:
    model = _Odd(forward)
    report = compress(model, example=torch.randn(5, 64), goal="size")
    whole = report.end_to_end
    assert whole is not None and report.swapped and 0 < whole.bound < 1e-4 and whole.difference <= whole.bound


class _Wrong(SparseLinear):
    """Right for what compress checks a layer with, one token; wrong for more."""

    tokens = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + 1e-4 * (x.reshape(-1, x.shape[-1]).shape[0] > self.tokens))


def test_a_wrong_sparse_layer_is_found_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONTEST, "SparseLinear", _Wrong)
    model = pruned_model()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"layer .0.: .* times the error bound"):
        compress(model)
    assert same(before, snapshot(model))


def test_outputs_that_differ_more_than_rounding_undo_the_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = pruned_model(), torch.randn(3, 96)
    monkeypatch.setattr(CONTEST, "check_layer", lambda *_: None)
    monkeypatch.setattr(CONTEST, "SparseLinear", _Wrong)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="where the bounds of its layers explain"):
        compress(model, example=x, goal="size")
    assert same(before, snapshot(model))


@pytest.mark.parametrize("moment", range(0, 20, 3))
def test_an_interruption_anywhere_leaves_the_model_as_it_was(moment: int) -> None:
    class Interrupting(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Interrupting.calls += 1
            if Interrupting.calls > moment:
                raise KeyboardInterrupt
            return x

    model = pruned_model()
    model.insert(1, Interrupting())
    prune.identity(model[0], "weight")
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        compress(model, example=torch.randn(3, 96), goal="size")
    assert same(before, snapshot(model))


def test_differences_count_shapes_and_what_is_not_finite() -> None:
    a = torch.tensor([3.0, 4.0, math.inf])
    assert differences([a, a], [torch.tensor([3.0, 4.5, math.inf]), a]) == pytest.approx([0.1, 0])
    assert differences([a, a], [torch.tensor([3.0, 4.0, 5.0]), a]) == [math.inf, 0]
    assert differences([a], []) == [math.inf] and differences([a, a], [a, a[:2]]) == [math.inf] * 2
    zeros = torch.zeros(2)
    assert differences([zeros, zeros], [zeros, zeros + 1]) == [0, math.inf]
