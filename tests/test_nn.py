"""`SparseLinear` against `nn.Linear`, and everything a layer goes through besides its forward."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from offpath import SparseLinear, pattern as patterns
from offpath.nn.sparse_weight import DEFAULT_SPARSITY


def _layer(sparsity: float = 0.8, seed: int = 0, **options) -> SparseLinear:
    return SparseLinear(12, 10, sparsity=sparsity, generator=torch.Generator().manual_seed(seed), **options)


def _same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)


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
    assert _same(_layer(), _layer())
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
    assert _same(back, linear)
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


def _through_bytes(layer: SparseLinear) -> SparseLinear:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _through_bytes],
    ids=["deepcopy", "pickle", "save"],
)
def test_copies_are_equal_and_independent(duplicate) -> None:
    layer = _layer()
    x = torch.randn(4, 12)
    layer(x).sum().backward()  # a layer that was used: what is derived from its pattern must not travel
    twin = duplicate(layer)
    assert _same(twin, layer)
    assert torch.equal(twin(x), layer(x))
    twin.values.data.zero_()
    assert not torch.equal(twin(x), layer(x))


def test_dtype_and_device_moves() -> None:
    layer = _layer()
    x = torch.randn(4, 12)
    expected = layer(x)
    layer.double()
    assert layer.values.dtype == torch.float64 and layer.col_indices.dtype == torch.int32
    torch.testing.assert_close(layer(x.double()).float(), expected)
    layer.to("cpu", torch.float32)
    assert torch.equal(layer(x), expected)
    layer.bfloat16()
    # Weights, input and output are rounded, each by at most 2^-8 of its size.
    size = x.abs() @ _layer().to_dense().weight.abs().t() + 1
    assert bool(((layer(x.bfloat16()).float() - expected).abs() <= 3 * 2**-8 * size).all())
    layer.type(torch.float32)  # casts every buffer, whole numbers too
    assert layer(x).dtype == torch.float32
    layer.half()
    with pytest.raises(ValueError, match=r"no kernels for torch\.float16"):
        layer(x.half())


def test_meta_layer_has_shapes_and_takes_a_checkpoint() -> None:
    source = _layer()
    layer = SparseLinear(12, 10, sparsity=0.8, device="meta")
    assert layer(torch.randn(4, 12, device="meta")).shape == (4, 10)
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(4, 12)
    assert torch.equal(layer(x), source(x))


@pytest.mark.parametrize("sparsity", [0.8, 0.5, 0.999], ids=["same nnz", "more", "none"])
def test_state_dict_loads_with_its_topology(sparsity: float) -> None:
    source, layer = _layer(sparsity, seed=1), _layer(0.8, seed=2)
    held_pattern, held_mask = layer.pattern, layer.pattern.to_mask()
    parameter = layer.values
    layer(torch.randn(4, 12)).sum().backward()
    layer.load_state_dict(source.state_dict())
    assert _same(layer, source)
    assert layer.values is parameter, "an optimizer that holds the parameter must go on holding it"
    assert layer.values.grad is None or layer.values.grad.shape == layer.values.shape
    assert torch.equal(held_pattern.to_mask(), held_mask), "a pattern that somebody holds must not change"
    x = torch.randn(4, 12)
    assert torch.equal(layer(x), source(x))
    layer(x).sum().backward()
    source.values.data.zero_()
    assert layer.nnz == 0 or int(layer.values.count_nonzero()), "loading must copy"


def test_safetensors_round_trip(tmp_path: Path) -> None:
    model = nn.Sequential(_layer(0.9, seed=3), nn.ReLU(), SparseLinear(10, 4))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = nn.Sequential(_layer(0.5, seed=4), nn.ReLU(), SparseLinear(10, 4, sparsity=0.1))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert _same(other, model)


def _without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: _without(s, "crow_indices", "col_indices"), "values without their topology mean nothing"),
        (lambda s: _without(s, "col_indices"), "col_indices is missing"),
        (lambda s: nn.Linear(12, 10).state_dict(), "holds a dense weight here.*sparsify"),
        (lambda s: s | {"col_indices": s["col_indices"] + 11}, "does not fit a 10 x 12 layer"),
        (lambda s: s | {"col_indices": s["col_indices"].flip(0)}, "does not fit a 10 x 12 layer"),
        (lambda s: s | {"col_indices": s["col_indices"].long()}, "int64"),
        (lambda s: s | {"crow_indices": s["crow_indices"][:-1]}, "crow_indices of 11 entries for 10 rows, got 10"),
        (lambda s: s | {"values": s["values"][:-1]}, "expected one value a column"),
        (lambda s: s | {"bias": torch.zeros(9)}, "expected a bias of shape"),
        (lambda s: s | {"values": [1.0], "bias": 3}, "expected tensors, got int for bias, list for values"),
    ],
    ids=["no topology", "no columns", "dense", "out of range", "unsorted", "int64", "rows", "values", "bias", "lists"],
)
def test_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(change, message: str) -> None:
    layer = _layer()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(change(_layer(0.5, seed=9).state_dict()), strict=strict)
        after = layer.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())


def test_checkpoint_without_data_is_refused_and_changes_nothing() -> None:
    layer = _layer()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="meta device"):
        layer.load_state_dict(SparseLinear(12, 10, sparsity=0.5, device="meta").state_dict())
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())


def test_loading_the_same_topology_keeps_what_was_prepared_from_it() -> None:
    layer = _layer(0.5, seed=1)
    layer(torch.randn(4, layer.in_features)).sum().backward()
    connections, prepared_bytes = layer.connections, layer.connections.bytes
    saved = layer.state_dict()
    layer.topology_digest += 1  # as a broadcast of another topology leaves it
    layer.load_state_dict(saved)
    assert layer.connections is connections and connections.bytes == prepared_bytes
    layer(torch.randn(4, layer.in_features))
    layer.load_state_dict(_layer(0.5, seed=3).state_dict())
    assert layer.connections is not connections


def test_training_goes_on_after_loading_another_nnz_while_an_old_graph_lives() -> None:
    layer, x = _layer(0.8), torch.randn(4, 12)
    old_loss = layer(x).sum()
    layer.load_state_dict(_layer(0.5, seed=3).state_dict())
    layer(x).sum().backward()
    assert layer.values.grad.shape == (60,)
    del old_loss


def test_checkpoint_of_model_and_optimizer_resumes_into_a_layer_of_another_nnz() -> None:
    def step(layer: SparseLinear, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        layer(torch.ones(4, 12)).square().sum().backward()
        optimizer.step()

    source, target = _layer(0.5, seed=3), _layer(0.8)
    optimizers = [torch.optim.Adam(layer.parameters(), fused=True) for layer in (source, target)]
    for layer, optimizer in zip((source, target), optimizers, strict=True):
        step(layer, optimizer)
    target.load_state_dict(source.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))  # torch shares what it can
    for layer, optimizer in zip((source, target), optimizers, strict=True):
        step(layer, optimizer)
    assert _same(source, target)


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


def test_values_that_another_process_broadcast_over_its_own_topology_are_refused() -> None:
    """What DistributedDataParallel does to a model that was not built from the same seed everywhere."""
    ours, theirs = _layer(seed=0), _layer(seed=1)
    assert ours.nnz == theirs.nnz
    with torch.no_grad():
        for mine, sent in zip(
            (*ours.parameters(), *ours.buffers()), (*theirs.parameters(), *theirs.buffers()), strict=True
        ):
            mine.copy_(sent)
    with pytest.raises(RuntimeError, match="the topologies differ"):
        ours(torch.randn(2, 12))
    with pytest.raises(RuntimeError, match="the topologies differ"):
        torch.compile(ours, backend="eager", fullgraph=True)(torch.randn(2, 12))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 12)
    assert torch.equal(ours(x), theirs(x))


def test_pruned_layer_saves_and_loads_as_torch_does() -> None:
    layer = _layer()
    prune.l1_unstructured(layer, "values", 0.5)
    layer.load_state_dict(layer.state_dict())
    assert int(layer.values.count_nonzero()) == layer.nnz // 2


@pytest.mark.parametrize("features", [(-1, 3), (3, -1)])
def test_negative_sizes_are_refused(features: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="sizes of at least 0"):
        SparseLinear(*features)


def test_absent_layer_is_a_missing_key_as_everywhere_in_torch() -> None:
    model = nn.Sequential(_layer())
    missing, _ = model.load_state_dict({}, strict=False)
    assert set(missing) == {"0.values", "0.bias", "0.crow_indices", "0.col_indices"}


def test_layer_compiles_without_graph_breaks() -> None:
    model = nn.Sequential(_layer(), nn.ReLU(), SparseLinear(10, 3))
    x = torch.randn(2, 5, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


def test_extra_repr() -> None:
    assert repr(_layer()) == "SparseLinear(in_features=12, out_features=10, bias=True, nnz=24, sparsity=0.8)"
    assert "bias=False" in repr(_layer(bias=False))
