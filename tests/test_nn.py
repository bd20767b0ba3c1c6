"""`SparseLinear` against `nn.Linear`, and everything a layer goes through besides its forward."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from offpath import SparseLinear, pattern as patterns
from offpath.nn.density import DEFAULT_SPARSITY
from storage_cases import same


def _layer(sparsity: float = 0.8, seed: int = 0, **options) -> SparseLinear:
    return SparseLinear(12, 10, sparsity=sparsity, generator=torch.Generator().manual_seed(seed), **options)


def test_full_pattern_is_nn_linear() -> None:
    linear = nn.Linear(12, 10, dtype=torch.float64)
    layer = SparseLinear.from_dense(linear)
    assert layer.nnz == 120
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    for module in (layer, linear):
        module(x).square().sum().backward()
    torch.testing.assert_close(layer(x), linear(x))
    torch.testing.assert_close(layer.values.grad.view(10, 12), linear.weight.grad)
    torch.testing.assert_close(layer.bias.grad, linear.bias.grad)


def test_trains_like_a_masked_dense_layer() -> None:
    torch.manual_seed(0)
    layer = _layer(dtype=torch.float64)
    dense = layer.to_dense()
    mask = layer.pattern.to_mask()
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (layer, dense)]
    for _ in range(20):
        x, target = torch.randn(8, 12, dtype=torch.float64), torch.randn(8, 10, dtype=torch.float64)
        for module, optimizer in zip((layer, dense), optimizers, strict=True):
            optimizer.zero_grad()
            (module(x) - target).square().mean().backward()
            if module is dense:
                dense.weight.grad *= mask
            optimizer.step()
    torch.testing.assert_close(layer.to_dense().weight, dense.weight)
    torch.testing.assert_close(layer.bias, dense.bias)


@pytest.mark.parametrize(("sparsity", "nnz"), [(0.0, 120), (0.9, 12), (0.999, 0)])
def test_sparsity_gives_exact_nnz(sparsity: float, nnz: int) -> None:
    layer = SparseLinear(12, 10, sparsity=sparsity)
    assert layer.nnz == nnz == layer.pattern.nnz
    assert layer.sparsity == 1 - nnz / 120


def test_default_sparsity_and_density() -> None:
    assert SparseLinear(100, 100).sparsity == pytest.approx(DEFAULT_SPARSITY)
    assert SparseLinear(100, 100, density=0.25).nnz == 2500


@pytest.mark.parametrize("sparsity", [float("nan"), -0.1, 1.0, 1.5])
def test_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"expected sparsity in \[0, 1\)"):
        SparseLinear(4, 4, sparsity=sparsity)


@pytest.mark.parametrize("density", [float("nan"), 0.0, 1.1])
def test_density_outside_its_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=r"expected density in \(0, 1\]"):
        SparseLinear(4, 4, density=density)


def test_conflicting_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="got several"):
        SparseLinear(4, 4, sparsity=0.5, density=0.5)
    with pytest.raises(ValueError, match=r"expected a pattern of shape \(out, in\) = \(4, 3\)"):
        SparseLinear(3, 4, pattern=patterns.full((3, 4)))


def test_initial_values_are_scaled_by_the_live_fan_in() -> None:
    mask = torch.zeros(3, 4000, dtype=torch.bool)
    mask[0, :] = True
    mask[1, :10] = True
    layer = SparseLinear(4000, 3, pattern=patterns.from_mask(mask), generator=torch.Generator().manual_seed(0))
    bound = 4000**-0.5
    # The variance of U(-b, b) is b^2/3; 4000 draws estimate it to 1.4 % (one standard deviation of its estimator).
    values = layer.values.detach()
    assert float(values[:4000].var()) == pytest.approx(bound**2 / 3, rel=0.07)
    assert float(values[:4000].abs().max()) <= bound
    assert float(values[4000:].abs().max()) <= 10**-0.5
    assert float(values[4000:].abs().max()) > bound
    assert float(layer.bias.detach()[2]) == 0


def test_a_seeded_layer_repeats_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    assert same(_layer(), _layer())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("shape", [(), (11,), (3, 11)])
def test_input_of_the_wrong_width_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected an input of 12 features"):
        _layer()(torch.randn(shape))


def test_autocast_computes_as_a_layer_of_its_dtype() -> None:
    layer, x = _layer(), torch.randn(8, 12)
    low = copy.deepcopy(layer).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(y, low(x))
        mixed = nn.Sequential(nn.Linear(12, 12), layer)
        mixed(x).sum().backward()
        wide = _layer(dtype=torch.float64)
        assert wide(x.double()).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == torch.float32
    assert layer.values.grad is not None and layer.values.grad.dtype == torch.float32
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).square().sum().backward()
    low(x.bfloat16()).square().sum().backward()
    assert torch.equal(layer.values.grad, low.values.grad.float())
    assert torch.equal(layer.bias.grad, low.bias.grad.float())


def test_wrong_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got .*float64"):
        _layer()(torch.randn(2, 12).double())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("features", [(1, 7), (7, 1), (1, 1), (0, 3), (3, 0)])
def test_thin_and_empty_layers_work(features: tuple[int, int]) -> None:
    layer = SparseLinear(*features, sparsity=0.5)
    x = torch.randn(5, features[0], requires_grad=True)
    layer(x).sum().backward()
    assert layer(x).shape == (5, features[1])
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


def test_layer_without_connections_returns_its_bias() -> None:
    layer = SparseLinear(12, 10, sparsity=0.999)
    layer.bias.data.normal_()
    assert torch.equal(layer(torch.randn(3, 12)), layer.bias.expand(3, 10))
    layer(torch.randn(3, 12)).sum().backward()
    assert layer.values.grad.shape == (0,)


def test_dense_round_trip() -> None:
    linear = nn.Linear(12, 10).eval()
    linear.weight.data *= torch.rand(10, 12) > 0.7
    linear.weight.requires_grad_(False)
    layer = SparseLinear.from_dense(linear)
    assert not layer.values.requires_grad and layer.bias.requires_grad and not layer.training
    back = layer.to_dense()
    assert same(back, linear)
    assert not back.weight.requires_grad and not back.training
    back.weight.data.zero_()
    assert int(layer.values.count_nonzero()) == layer.nnz


def test_from_dense_with_a_pattern_keeps_the_zeros_it_names() -> None:
    linear = nn.Linear(3, 2)
    linear.weight.data.zero_()
    assert SparseLinear.from_dense(linear, patterns.full((2, 3))).nnz == 6
    with pytest.raises(ValueError, match="expected a pattern of shape"):
        SparseLinear.from_dense(linear, patterns.full((3, 2)))


def test_from_dense_leaves_the_global_generator_alone() -> None:
    linear = nn.Linear(12, 10)
    state = torch.get_rng_state()
    SparseLinear.from_dense(linear).to_dense()
    assert torch.equal(state, torch.get_rng_state())


def test_layers_made_from_one_pattern_share_nothing(tmp_path: Path) -> None:
    pattern = patterns.random((10, 12), 24)
    model = nn.Sequential(SparseLinear(12, 10, pattern=pattern), SparseLinear(12, 10, pattern=pattern))
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # refuses tensors that share memory
    model[0].load_state_dict(_layer(0.5, seed=3).state_dict())
    assert model[1].pattern.equals(pattern)


def test_nothing_that_a_layer_hands_out_leads_to_its_topology() -> None:
    layer, x = _layer(), torch.randn(4, 12)
    expected = layer(x)
    for tensor in (layer.col_indices, layer.pattern.col_indices, layer.state_dict()["col_indices"]):
        tensor.fill_(2**30)
    assert torch.equal(layer(x), expected) and torch.equal(copy.deepcopy(layer)(x), expected)


@pytest.mark.parametrize("features", [(-1, 3), (3, -1)])
def test_negative_sizes_are_refused(features: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="sizes of at least 0"):
        SparseLinear(*features)


def test_layer_compiles_without_graph_breaks() -> None:
    model = nn.Sequential(_layer(), nn.ReLU(), SparseLinear(10, 3))
    x = torch.randn(2, 5, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


def test_extra_repr() -> None:
    assert repr(_layer()) == "SparseLinear(in_features=12, out_features=10, bias=True, nnz=24, sparsity=0.8)"
    assert "bias=False" in repr(_layer(bias=False))
