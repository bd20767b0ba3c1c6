"""`compress`: what it swaps, what decides that, and what it reports."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import offpath
from compress_cases import CONTEST, few_rounds as few_rounds, pruned_model, same, set_to_zero, snapshot
from offpath import SparseLinear, compress
from offpath.convert.compress.contest import TOKENS
from offpath.convert.compress.decide import decide
from offpath.convert.compress.example import Example
from offpath.convert.compress.measure import Trial, in_rotation
from offpath.convert.compress.report import CompressReport, Measured


def test_layers_that_are_mostly_zero_are_swapped_and_reported() -> None:
    model = pruned_model()
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


@pytest.mark.parametrize("precision", [None, "int8"])
def test_what_is_swapped_for_its_size_stays_small_with_any_number_of_tokens(precision: str | None) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 256))
    for layer, sparsity in zip(model, (0.6, 0.75, 0.95), strict=True):
        prune.random_unstructured(layer, "weight", sparsity)
    report = compress(model, batch=1, goal="size", precision=precision)
    assert len(report.swapped) == 3
    with torch.no_grad():
        for tokens in TOKENS:
            model(torch.randn(tokens, 256))
        assert offpath.cost.memory_bytes(model) == report.model_bytes_at_most < report.model_bytes_before
        for tokens in (7, 33, 100, 700):
            model(torch.randn(tokens, 256))
    assert offpath.cost.memory_bytes(model) < report.model_bytes_before


def test_bytes_with_other_numbers_of_tokens_are_told() -> None:
    report = compress(pruned_model(), batch=6)
    layer = replace(report.layers[0], swapped=True, bytes_after=100, bytes_at_most=350)
    report = replace(report, layers=(layer,), model_bytes_after=1000)
    assert "1,000 after (up to 1,250 with other numbers of tokens)" in str(report)
    assert "up to" not in str(replace(report, layers=(replace(layer, bytes_at_most=100),)))


@pytest.mark.parametrize("called_before", [False, True])
def test_a_compiled_model_is_looked_at_uncompiled(called_before: bool) -> None:
    model, x = pruned_model().eval(), torch.randn(5, 96)
    run = torch.compile(model, backend="eager")
    with torch.no_grad():
        right = run(x) if called_before else model(x)
        assert len(compress(run, example=x, goal="size").swapped) == 2 and type(model[0]) is SparseLinear
        torch.testing.assert_close(run(x), right)


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
    model = pruned_model()
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
    model = pruned_model()
    model[2].eval()
    model[0].bias.requires_grad_(False)
    compress(model, goal="size", example=torch.randn(8, 96))
    assert model[0].training and not model[2][0].training and not model[0].bias.requires_grad
    model(torch.randn(8, 96)).sum().backward()
    assert model[0].values.grad is not None


def test_a_module_used_twice_stays_shared() -> None:
    shared = nn.Linear(64, 64)
    set_to_zero(shared.weight)
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
                set_to_zero(layer.weight)

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


def test_outputs_may_differ_by_one_rounding_where_the_bound_came_out_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Example, "outputs_off_by_the_bound", lambda self, bounds: self.outputs())
    model = nn.Sequential(nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8) * 2)  # nothing is rounded
    whole = compress(copy.deepcopy(model), example=torch.ones(2, 8), goal="size").end_to_end
    assert whole is not None and whole.bound == torch.finfo(torch.float32).eps

    class Both(nn.Module):  # what bfloat16 rounds by excuses no float32 beside it
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            off = 1e-3 if isinstance(self.inner[0], SparseLinear) else 0.0
            return self.inner(x) + off, x.bfloat16()

    with pytest.raises(RuntimeError, match=r"differ by .* where the bounds of its layers explain 1\.19e-07"):
        compress(Both(), example=torch.ones(2, 8), goal="size")


def test_nothing_that_is_mostly_zero_is_a_clear_report() -> None:
    model = pruned_model(0.2)
    before = snapshot(model)
    report = compress(model, example=torch.randn(2, 96))
    assert report.layers == () and "prune first" in str(report) and same(before, snapshot(model))
    assert compress(nn.Sequential(nn.ReLU())).layers == ()
    whole = report.end_to_end
    assert whole is not None and whole.dense_seconds == whole.predicted_seconds == whole.measured_seconds


def test_a_report_without_layers_advises_only_what_helps() -> None:
    """Pruning helps neither what is sparse already nor what has no kernel; and int8 embeddings are a change."""
    model = pruned_model().half()
    text = str(compress(model))
    assert "no kernel computes in torch.float16" in text and "prune first" not in text
    convolutional = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16, 4))
    set_to_zero(convolutional[0].weight, 0.9)
    text = str(compress(convolutional))
    assert "give example= for those below that are" in text and "prune first" not in text
    assert "(at least 99.9%); prune first" in str(compress(pruned_model(), min_sparsity=0.999))
    assert "less than 99.9% of its weights" in str(compress(pruned_model(), min_sparsity=0.999))
    text = str(compress(nn.Sequential(nn.Embedding(50, 64)), embeddings="int8"))
    assert "int8 embedding: 0" in text and "nothing was changed" not in text


def test_filter_fn_and_min_sparsity_choose() -> None:
    model = pruned_model(0.6)
    assert not compress(model, min_sparsity=0.7).layers
    report = compress(model, filter_fn=lambda module, name: name != "0", goal="size")
    assert [layer.name for layer in report.layers] == ["2.0"] and type(model[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_models_compile_copy_and_pickle(dtype: torch.dtype) -> None:
    model, x = pruned_model().to(dtype).eval(), torch.randn(6, 96).to(dtype)
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
        model = pruned_model().to(dtype)
        report = compress(model, batch=batch, precision="int8", goal="size")
        assert {layer.becomes for layer in report.swapped} == {"Int8SparseLinear"}
