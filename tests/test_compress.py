"""`compress`: what it swaps, what it leaves alone, and that nothing it refuses has changed the model."""

from __future__ import annotations

import copy
import importlib
import io
import json
import math
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import offpath
from offpath import SparseLinear, compress
from offpath.convert.compress.decide import decide
from offpath.convert.compress.example import largest_difference
from offpath.convert.compress.measure import Trial, in_rotation
from offpath.convert.compress.report import CompressReport, Measured

# By their full names: `offpath.convert.compress` is the function.
CONTEST, FINISH = (importlib.import_module(f"offpath.convert.compress.{m}") for m in ("contest", "finish"))


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CONTEST, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(FINISH, "ROUNDS", 1)


def _zero(weight: torch.Tensor, sparsity: float = 0.9) -> None:
    """Zero out that share of the smallest entries."""
    with torch.no_grad():
        smallest = weight.abs().flatten().topk(round(sparsity * weight.numel()), largest=False).indices
        weight.view(-1)[smallest] = 0


def _model(sparsity: float = 0.9) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(96, 128), nn.ReLU(), nn.Sequential(nn.Linear(128, 64, bias=False)), nn.Linear(64, 4)
    )
    for layer in (model[0], model[2][0]):
        _zero(layer.weight, sparsity)
    return model


def _snapshot(model: nn.Module) -> list:
    """All that must be the same when nothing was changed: the modules themselves, tensors, modes and hooks."""
    tensors = [(name, id(t), t.clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]]
    hooks = [[len(v) for k, v in vars(m).items() if "_hooks" in k and isinstance(v, dict)] for m in model.modules()]
    return [[(n, id(m), m.training) for n, m in model.named_modules()], hooks, tensors]


def _same(before: list, after: list) -> bool:
    equal = all(
        a[:2] == b[:2] and (a[2].is_meta or torch.equal(a[2].nan_to_num(), b[2].nan_to_num()))
        for a, b in zip(before[2], after[2], strict=True)
    )
    return equal and before[:2] == after[:2]


def test_layers_that_are_mostly_zero_are_swapped_and_reported() -> None:
    model = _model()
    dense, x = copy.deepcopy(model), torch.randn(5, 96)
    report = compress(model, goal="size")
    # Before anything is computed with another number of tokens, for which another product may prepare other plans.
    held = sum(offpath.cost.memory_bytes(model.get_submodule(layer.name)) for layer in report.swapped)
    assert [layer.name for layer in report.swapped] == ["0", "2.0"]
    assert report.skipped == (("3", "less than 50% of its weights are zero"),)
    assert type(model[0]) is SparseLinear and type(model[2][0]) is SparseLinear and type(model[3]) is nn.Linear
    assert torch.equal(model[0].to_dense().weight, dense[0].weight)
    torch.testing.assert_close(model(x), dense(x))
    for layer in report.layers:
        assert [m.tokens for m in layer.measured] == [1, 256]
        assert all(m.dense_seconds > 0 and m.sparse_seconds > 0 for m in layer.measured)
    assert report.bytes_before == (96 * 128 + 128 + 128 * 64) * 4
    assert report.bytes_after == held < report.bytes_before
    assert report.model_bytes_before - report.model_bytes_after == report.bytes_before - report.bytes_after
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["nnz"] == report.layers[0].nnz
    assert "total" in str(report) and "256 tokens" in str(report) and "left as it was: 3" in str(report)


def test_what_is_slower_stays_dense_and_says_so_in_numbers() -> None:
    one, many = Measured(1, 1, 2e-3, 1e-3), Measured(256, 1, 1.2e-3, 1.4e-3)
    assert decide("speed", [one], False, 9, 9) == (True, "2.00 times as fast for 1 token")
    assert decide("speed", [one, many], False, 9, 9) == (
        False,
        "dense is faster here: 1.2 ms against 1.4 for 256 tokens",
    )
    assert decide("speed", [one, many], True, 9, 9)[0]  # a pass gets faster by both together
    assert not decide("speed", [Measured(1, 1, 2e-3, 1e-3), Measured(256, 6, 1.2e-3, 1.4e-3)], True, 9, 9)[0]
    assert decide("size", [many], False, 9, 8)[0]
    assert decide("size", [one], False, 8, 9) == (False, "sparse, it would take 9 bytes instead of 8")


@pytest.mark.parametrize("wins", [True, False])
def test_the_measurement_decides(wins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(trials, *_):
        times = (2e-3, 1e-3) if wins else (1e-3, 2e-3)
        return [times for _ in trials]

    monkeypatch.setattr(CONTEST, "in_rotation", measured)
    model = _model()
    report = compress(model, batch=7)
    assert [layer.swapped for layer in report.layers] == [wins, wins]
    assert (type(model[0]) is SparseLinear) == wins
    assert ("dense is faster here" in str(report)) == (not wins)


def test_rotation_calls_every_layer_in_every_round_and_shares_times_within_a_key() -> None:
    calls: list[str] = []

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: torch.Tensor) -> None:
            calls.append(self.name)

    x, ticks, now = torch.ones(1), [], iter(range(10**6))
    trials = [Trial(key, Named(f"dense {i}"), Named(f"sparse {i}"), x) for i, key in enumerate("aab")]
    times = in_rotation(trials, 0.0, ticks.append, lambda: float(next(now)))
    assert calls[:6] == [*(f"dense {i}" for i in range(3)), *(f"sparse {i}" for i in range(3))]
    assert calls.count("dense 1") == calls.count("sparse 2") == 6  # one to warm up
    assert times == [(1.0, 1.0)] * 3
    assert ticks[-1] == 1.0


def test_pruning_masks_are_made_permanent() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).double()
    prune.l1_unstructured(model[0], "weight", 0.9)
    prune.l1_unstructured(model[0], "bias", 0.5)
    prune.l1_unstructured(model[1], "weight", 0.1)
    expected, kept = model[0].weight.detach().clone(), copy.deepcopy(model[1].state_dict())
    bias = model[0].bias.detach().clone()
    report = compress(model, goal="size")
    assert [layer.name for layer in report.swapped] == ["0"]
    assert torch.equal(model[0].to_dense().weight, expected) and torch.equal(model[0].bias, bias)
    assert model[1].state_dict().keys() == kept.keys() and prune.is_pruned(model[1])


class _Masked(nn.Module):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.mask


def test_parametrizations_are_evaluated_and_made_permanent() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    parametrize.register_parametrization(model[0], "weight", _Masked((torch.rand(64, 64) > 0.9).float()))
    parametrizations.spectral_norm(model[1])
    model[0].parametrizations.weight.original.requires_grad_(False)
    before, vectors = model[0].weight.detach().clone(), model[1].parametrizations.weight[0]._u.clone()
    report = compress(model, goal="size")
    assert [layer.name for layer in report.swapped] == ["0"]
    assert torch.equal(model[0].to_dense().weight, before) and not model[0].values.requires_grad
    assert torch.equal(model[1].parametrizations.weight[0]._u, vectors), "evaluating it has changed it"


def test_modes_and_requires_grad_are_kept_and_it_trains() -> None:
    model = _model()
    model[2].eval()
    model[0].bias.requires_grad_(False)
    compress(model, goal="size", example=torch.randn(8, 96))
    assert model[0].training and not model[2][0].training and not model[0].bias.requires_grad
    model(torch.randn(8, 96)).sum().backward()
    assert model[0].values.grad is not None


def test_a_module_used_twice_stays_shared() -> None:
    shared = nn.Linear(64, 64)
    _zero(shared.weight)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    report = compress(model, example=torch.randn(8, 64), goal="size")
    assert len(report.layers) == 1 and report.layers[0].measured[0].calls == 2
    assert model[0] is model[2][0] and type(model[0]) is SparseLinear


def test_the_example_tells_shapes_and_the_report_compares_the_whole_model() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.unused, self.drop = nn.Linear(64, 64), nn.Linear(64, 64), nn.Dropout(0.5)
            for layer in (self.layer, self.unused):
                _zero(layer.weight)

        def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> dict:
            return {"y": [self.drop(self.layer(x)), self.layer(x[:, 0])], "scale": scale}

    model, steps = Twice(), []
    example = {"x": torch.randn(4, 8, 64), "scale": 2.0}
    report = compress(model, example=example, goal="size", progress=lambda done, total: steps.append((done, total)))
    assert [(m.tokens, m.calls) for m in report.layers[0].measured] == [(32, 1), (4, 1)]
    assert report.skipped == (("unused", "the example does not reach it, so that nothing tells what it is used for"),)
    whole = report.end_to_end
    assert whole is not None and 0 <= whole.difference <= whole.bound < 1e-4 and model.drop.training
    assert whole.predicted_speedup > 0 and whole.measured_speedup > 0 and "on the example" in str(report)
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]


def test_nothing_that_is_mostly_zero_is_a_clear_report() -> None:
    model = _model(0.2)
    before = _snapshot(model)
    report = compress(model, example=torch.randn(2, 96))
    assert report.layers == () and "prune first" in str(report) and _same(before, _snapshot(model))
    assert compress(nn.Sequential(nn.ReLU())).layers == ()
    whole = report.end_to_end
    assert whole is not None and whole.dense_seconds == whole.predicted_seconds == whole.measured_seconds


def test_a_report_without_layers_advises_only_what_helps() -> None:
    """Pruning helps neither what is sparse already nor what has no kernel; and int8 embeddings are a change."""
    model = _model().half()
    text = str(compress(model))
    assert "no kernel computes in torch.float16" in text and "prune first" not in text
    assert "(at least 99.9%); prune first" in str(compress(_model(), min_sparsity=0.999))
    assert "less than 99.9% of its weights" in str(compress(_model(), min_sparsity=0.999))
    text = str(compress(nn.Sequential(nn.Embedding(50, 64)), embeddings="int8"))
    assert "int8 embedding: 0" in text and "nothing was changed" not in text


def test_filter_fn_and_min_sparsity_choose() -> None:
    model = _model(0.6)
    assert not compress(model, min_sparsity=0.7).layers
    report = compress(model, filter_fn=lambda module, name: name != "0", goal="size")
    assert [layer.name for layer in report.layers] == ["2.0"] and type(model[0]) is nn.Linear


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
            "encoder": nn.TransformerEncoderLayer(16, 2, 32),
            "lazy": nn.LazyLinear(4),
            "normed": nn.Linear(16, 16),
            "tied": nn.Linear(16, 16),
            "tied too": nn.Linear(16, 16),
        }
    )
    for module in model.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, nn.LazyLinear) and module.weight.numel():
            _zero(module.weight)
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
        "encoder.linear1": "reads its weight instead of calling it",
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
    model = _model()
    if change is not None:
        change(model)
    before = _snapshot(model)
    with pytest.raises(error, match=message):
        compress(model, **arguments)
    assert _same(before, _snapshot(model))


def test_a_bare_layer_and_what_is_no_module_are_refused() -> None:
    with pytest.raises(ValueError, match="from_dense"):
        compress(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="got str"):
        compress("model.safetensors")


def test_autocast_is_refused_and_inference_mode_leaves_no_trace() -> None:
    model, x = _model(), torch.randn(3, 96)
    before = _snapshot(model)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"outside of torch\.autocast"):
        compress(model, example=x)
    assert _same(before, _snapshot(model))
    with torch.inference_mode():
        compress(model, example=x, goal="size")
    assert type(model[0]) is SparseLinear
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class _Odd(nn.Module):
    """A sparse layer in a model whose `forward` is given."""

    def __init__(self, forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.calls, self._forward = nn.Linear(64, 64), 0, forward
        _zero(self.layer.weight)

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
    before = _snapshot(model)
    with pytest.raises(ValueError, match=message):
        compress(model, example=torch.randn(5, 64), goal="size")
    assert _same(before, _snapshot(model))


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
    model = _model()
    before = _snapshot(model)
    with pytest.raises(RuntimeError, match=r"layer .0.: .* times the error bound"):
        compress(model)
    assert _same(before, _snapshot(model))


def test_outputs_that_differ_more_than_rounding_undo_the_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _model(), torch.randn(3, 96)
    monkeypatch.setattr(CONTEST, "check_layer", lambda *_: None)
    monkeypatch.setattr(CONTEST, "SparseLinear", _Wrong)
    before = _snapshot(model)
    with pytest.raises(RuntimeError, match="where the bounds of its layers explain"):
        compress(model, example=x, goal="size")
    assert _same(before, _snapshot(model))


@pytest.mark.parametrize("moment", range(0, 20, 3))
def test_an_interruption_anywhere_leaves_the_model_as_it_was(moment: int) -> None:
    class Interrupting(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Interrupting.calls += 1
            if Interrupting.calls > moment:
                raise KeyboardInterrupt
            return x

    model = _model()
    model.insert(1, Interrupting())
    prune.identity(model[0], "weight")
    before = _snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        compress(model, example=torch.randn(3, 96), goal="size")
    assert _same(before, _snapshot(model))


def test_differences_count_shapes_and_what_is_not_finite() -> None:
    a = torch.tensor([3.0, 4.0, math.inf])
    assert largest_difference([a], [torch.tensor([3.0, 4.5, math.inf])]) == pytest.approx(0.1)
    assert largest_difference([a], [torch.tensor([3.0, 4.0, 5.0])]) == math.inf
    assert largest_difference([a], []) == math.inf and largest_difference([a], [a[:2]]) == math.inf
    zeros = torch.zeros(2)
    assert largest_difference([zeros], [zeros]) == 0 and largest_difference([zeros], [zeros + 1]) == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_models_compile_copy_and_pickle(dtype: torch.dtype) -> None:
    model, x = _model().to(dtype).eval(), torch.randn(6, 96).to(dtype)
    report: CompressReport = compress(model, batch=6, goal="size")
    assert len(report.swapped) == 2
    with torch.no_grad():
        y = model(x)
        assert torch.equal(copy.deepcopy(model)(x), y)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), y)
        if dtype is torch.float32:
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_layers_pass_the_check_at_every_batch(dtype: torch.dtype) -> None:
    """In bfloat16, methods that multiply a copy of the values round their sums before the scale."""
    for batch in (1, 16, 64):
        model = _model().to(dtype)
        report = compress(model, batch=batch, precision="int8", goal="size")
        assert {layer.becomes for layer in report.swapped} == {"Int8SparseLinear"}
