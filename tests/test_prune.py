"""Pruning by the weights alone: what is kept, exactly so many, and what is left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune as masks

import offpath
from offpath.convert.prune.select import keep_largest, keep_largest_of_all


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 30), nn.Linear(30, 7))


def _mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 7))


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.data())
@settings(deadline=None, max_examples=40)
def test_the_largest_are_kept_and_of_equal_ones_the_first(numbers: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(numbers)))
    scores = torch.tensor([numbers, numbers[::-1]], dtype=torch.float32)
    kept = keep_largest(scores, count)
    for row, keep in zip(scores.tolist(), kept, strict=True):
        expected = sorted(range(len(numbers)), key=lambda i, row=row: -row[i])[:count]
        assert keep.nonzero().flatten().tolist() == sorted(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
def test_threshold_over_all_layers_agrees_with_a_sort_of_everything(dtype: torch.dtype, tied: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(n, generator=generator, dtype=dtype).abs() for n in (1, 1000, 3333)]
    layers[1][:9] = torch.tensor([0.0, torch.finfo(dtype).tiny / 4, torch.finfo(dtype).max] * 3, dtype=dtype)
    layers = [layer.round() if tied else layer for layer in layers]
    every = torch.cat(layers)
    for count in (0, 1, 433, 4334):
        expected = torch.zeros_like(every, dtype=torch.bool)
        expected[every.sort(descending=True, stable=True).indices[:count]] = True
        kept = keep_largest_of_all([lambda a=a: a for a in layers], count)
        assert torch.equal(torch.cat(list(kept)), expected)


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("scope", ["layer", "output", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_counts_are_exact_and_survivors_keep_their_bits(method: str, scope: str, sparsity: float) -> None:
    model = _model()
    before, parameters = _weights(model), list(model.parameters())
    done: list[tuple[int, int]] = []
    report = offpath.prune(model, sparsity, method, scope=scope, seed=1, progress=lambda *now: done.append(now))
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [layer.name for layer in report.layers] == ["0", "3", "4"]
    density = 1 - sparsity
    for layer in report.layers:
        weight, old = model.get_submodule(layer.name).weight, before[f"{layer.name}.weight"]
        alive = weight != 0
        assert torch.equal(weight[alive], old[alive])
        assert layer.nnz == int(alive.sum()) and layer.shape == tuple(weight.shape)
        if scope == "layer":
            assert layer.nnz == round(density * weight.numel())
        if scope == "output":
            assert set(alive.flatten(1).sum(1).tolist()) == {round(density * weight[0].numel())}
        if scope == "layer" and method == "magnitude" and 0 < layer.nnz < weight.numel():
            assert old[alive].abs().min() >= old[~alive].abs().max()
    if scope == "global":
        assert report.nnz == round(density * sum(m.weight.numel() for m in model if hasattr(m, "weight")))
    for name, tensor in model.state_dict().items():
        assert name.endswith("weight") or torch.equal(tensor, before[name])


def test_global_magnitude_takes_the_smallest_of_all() -> None:
    model = _mlp().double()  # float64: compared in float64
    model[0].float()
    old = torch.cat([model[0].weight.double().flatten(), model[2].weight.flatten()]).abs()
    offpath.prune(model, 0.8, scope="global")
    alive = torch.cat([model[0].weight.flatten() != 0, model[2].weight.flatten() != 0])
    assert old[alive].min() >= old[~alive].max()


def test_erk_shares_as_the_topologies_do_and_sees_the_kernel_of_a_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Linear(100, 200), nn.Linear(200, 10))
    report = offpath.prune(model, 0.9, distribution="erk")
    densities = [layer.nnz / np.prod(layer.shape) for layer in report.layers]
    factors = [d * np.prod(a.shape) / sum(a.shape) for d, a in zip(densities, report.layers, strict=True)]
    # One factor of sum(shape) / prod(shape) (Evci et al., 2020), as exactly as whole weights allow.
    spread = max(1 / sum(layer.shape) for layer in report.layers)
    assert max(factors) - min(factors) <= spread and max(densities) < 1
    assert abs(report.sparsity - 0.9) * sum(np.prod(a.shape) for a in report.layers) <= len(report.layers)


def test_a_seed_decides_what_random_takes_and_torchs_generator_is_left_alone() -> None:
    first, second, third = _mlp(), _mlp(), _mlp()
    state = torch.get_rng_state()
    for model, seed in ((first, 1), (second, 1), (third, 2)):
        offpath.prune(model, 0.5, "random", seed=seed)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first[0].weight, second[0].weight) and not torch.equal(first[0].weight, third[0].weight)
    offpath.prune(_mlp(), 0.5, "random")
    assert not torch.equal(state, torch.get_rng_state())


def test_writes_are_counted_in_the_version_and_gradients_stay() -> None:
    model = _mlp()
    model(torch.randn(2, 20)).sum().backward()
    version, grad = model[0].weight._version, model[0].weight.grad.clone()
    with torch.inference_mode():
        offpath.prune(model, 0.5)
    assert model[0].weight._version > version and torch.equal(model[0].weight.grad, grad)


def test_channels_last_convolutions_and_half_precision() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = nn.Conv2d(4, 8, 3).to(dtype=dtype, memory_format=torch.channels_last)
        old, strides = model.weight.detach().clone(), model.weight.stride()
        report = offpath.prune(model, 0.5)
        alive = model.weight != 0
        assert report.nnz == 144 == int(alive.sum()) and model.weight.stride() == strides
        assert torch.equal(model.weight[alive], old[alive])
        assert old[alive].abs().min() >= old[~alive].abs().max()


def test_the_report_prints_as_a_table() -> None:
    model = _mlp()
    masks.random_unstructured(model[2], "weight", 0.5)
    text = str(offpath.prune(model, 0.9))
    assert "30 x 20   60    90.00%" in text and "left as it was: 2 (its weight is computed by a mask" in text
    nothing = offpath.prune(nn.Sequential(nn.LazyLinear(3)))
    assert nothing.sparsity == 0.0 and str(nothing).startswith("no layer can be pruned: nothing was changed\nleft as")
    with pytest.raises(TypeError, match="got list"):
        offpath.prune([model])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # torch's word on the layer without weights
def test_layers_that_cannot_be_pruned_are_left_and_named() -> None:
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(20, 8),
            "head": nn.Linear(8, 20),
            "whole": nn.Linear(8, 10),
            "view": nn.Linear(8, 5),
            "masked": masks.l1_unstructured(nn.Linear(8, 8), "weight", 0.5),
            "parametrized": parametrizations.weight_norm(nn.Linear(8, 8)),
            "sparse": offpath.SparseLinear(8, 8),
            "lazy": nn.LazyLinear(3),
            "integer": nn.Linear(8, 8),
            "empty": nn.Linear(0, 8),
            "expanded": nn.Linear(8, 8),
            "free": nn.Linear(8, 8),
        }
    )
    model["head"].weight = model["embedding"].weight
    model["view"].weight = nn.Parameter(model["whole"].weight.data[3:8])
    model["integer"].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    model["expanded"].weight = nn.Parameter(torch.ones(1, 8).expand(8, 8))
    before = {name: m.weight.clone() for name, m in model.items() if name not in ("sparse", "lazy", "free")}
    report = offpath.prune(model, 0.5)
    assert [layer.name for layer in report.layers] == ["free"]
    reasons = dict(report.skipped)
    for name, words in {
        "head": "tied",
        "whole": "tied",
        "view": "tied",
        "masked": "prune.remove",
        "parametrized": "remove_parametrizations",
        "sparse": "sparse already",
        "lazy": "call the model once first",
        "integer": "torch.int8",
        "empty": "no weights",
        "expanded": "tied",
    }.items():
        assert words in reasons.pop(name)
    assert not reasons
    for name, weight in before.items():
        assert torch.equal(model[name].weight, weight)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, and still around
def test_quantised_layers_are_left_and_named() -> None:
    from torch.ao.nn.quantized import dynamic

    report = offpath.prune(nn.Sequential(dynamic.Linear(4, 4), nn.Linear(4, 4)), 0.5)
    assert report.skipped == (("0", "it is quantised; prune before that"),) and len(report.layers) == 1


def test_a_module_used_twice_is_pruned_once_and_a_bare_layer_too() -> None:
    shared = nn.Linear(8, 8)
    assert len(offpath.prune(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}), 0.5).layers) == 1
    assert offpath.prune(nn.Linear(8, 8), 0.75).nnz == 16


def test_filter_fn_chooses() -> None:
    model = _mlp()
    report = offpath.prune(model, 0.5, filter_fn=lambda module, fqn: fqn == "2" and module.in_features == 30)
    assert [layer.name for layer in report.layers] == ["2"] and not (model[0].weight == 0).any()


X = [torch.zeros(1, 20)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity in \[0, 1\)"),
        ({"sparsity": float("nan")}, r"sparsity in \[0, 1\)"),
        ({"sparsity": -0.1}, r"sparsity in \[0, 1\)"),
        ({"sparsity": "0.9"}, r"sparsity in \[0, 1\), got '0.9'"),
        ({"sparsity": torch.tensor(0.5)}, r"sparsity in \[0, 1\), got tensor"),
        ({"method": "best"}, "magnitude, random, wanda, sparsegpt"),
        ({"filter_fn": {"0"}}, r"function of \(module, name\), got set"),
        ({"scope": "row"}, "layer, output, global"),
        ({"distribution": "equal"}, "uniform, erk"),
        ({"scope": "global", "distribution": "erk"}, "left alone with scope 'global'"),
        ({"method": "sparsegpt", "scope": "layer", "calibration": X}, "no scope with method 'sparsegpt'"),
        ({"method": "wanda"}, "expected calibration"),
        ({"calibration": X}, "'magnitude' looks at no inputs"),
        ({"blocksize": 64}, "'sparsegpt' alone"),
        ({"method": "wanda", "calibration": X, "dampening": 0.1}, "'sparsegpt' alone"),
        ({"method": "sparsegpt", "calibration": X, "blocksize": 0}, "positive number of columns"),
        ({"method": "sparsegpt", "calibration": X, "dampening": 0.0}, "dampening above 0"),
        ({"method": "wanda", "calibration": []}, "at least one batch"),
        ({"method": "wanda", "calibration": [X[0][:0]]}, "is it empty"),
        ({"method": "wanda", "calibration": X[0]}, "put a single batch into a list"),
        ({"method": "wanda", "calibration": {"x": X[0]}}, "put a single batch into a list"),
        ({"method": "wanda", "calibration": 3}, "got a int"),
        ({"method": "wanda", "calibration": iter(X)}, "several times.*list_iterator"),
        ({"method": "wanda", "calibration": ["text"]}, "mapping of keyword arguments, got a str"),
        ({"method": "wanda", "calibration": [torch.full((2, 20), float("nan"))]}, "NaN or infinity at the .* '0'"),
        ({"method": "sparsegpt", "calibration": [*X, torch.full((2, 20), float("inf"))]}, "finite activations"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict, message: str) -> None:
    model = _mlp()
    before = _weights(model)
    with pytest.raises(ValueError, match=message):
        offpath.prune(model, **arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["magnitude", "random", "wanda"])
def test_weights_that_are_not_finite_change_nothing(bad: float, method: str) -> None:
    model = _mlp()
    model[2].weight.data[3, 4] = bad
    first = model[0].weight.clone()
    with pytest.raises(ValueError, match="NaN or infinity in layer '2'"):
        offpath.prune(model, 0.5, method, calibration=X if method == "wanda" else None)
    assert torch.equal(model[0].weight, first)


def test_weights_without_memory_and_those_of_inference_mode_are_refused() -> None:
    with pytest.raises(ValueError, match="layer '0' on the meta device"):
        offpath.prune(nn.Sequential(nn.Linear(4, 4, device="meta")), 0.5)
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="inference_mode"):
        offpath.prune(model, 0.5)
