"""A sparse layer copied, moved, saved and loaded: its topology goes along, and what does not fit is refused."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import prune, weight_norm

from offpath import SparseLinear
from storage_cases import same


def _layer(sparsity: float = 0.8, seed: int = 0, **options) -> SparseLinear:
    return SparseLinear(12, 10, sparsity=sparsity, generator=torch.Generator().manual_seed(seed), **options)


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
    assert same(twin, layer)
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
    assert same(layer, source)
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
    assert same(other, model)


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
    assert same(source, target)


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


def test_absent_layer_is_a_missing_key_as_everywhere_in_torch() -> None:
    model = nn.Sequential(_layer())
    missing, _ = model.load_state_dict({}, strict=False)
    assert set(missing) == {"0.values", "0.bias", "0.crow_indices", "0.col_indices"}


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm:FutureWarning")  # deprecated, and still around
@pytest.mark.parametrize("dim", [0, None])
def test_values_that_weight_norm_computes_load_with_their_topology(dim: int | None) -> None:
    normed, other = _layer(seed=0), _layer(seed=1)
    for layer in (normed, other):
        weight_norm(layer, "values", dim=dim)
    x = torch.randn(3, 12)
    other.load_state_dict(normed.state_dict())
    assert torch.equal(other(x), normed(x)) and torch.equal(other.col_indices, normed.col_indices)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    larger = weight_norm(_layer(sparsity=0.5), "values", dim=dim)
    with pytest.raises(RuntimeError, match="24 connections, as many as values_g and values_v are for, got 60"):
        other.load_state_dict(larger.state_dict())
    with pytest.raises(RuntimeError, match=r"values_v with the topology .* but values_g is missing"):
        other.load_state_dict(_without(normed.state_dict(), "values_g"), strict=False)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_state_dict_in_a_mode_is_asked_for_no_numbers() -> None:
    layer = _layer()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer.state_dict().keys() == {"values", "bias", "crow_indices", "col_indices"}


def test_a_state_dict_is_compiled_into_one_graph_as_that_of_other_layers_is() -> None:
    dense, layer = nn.Linear(2, 3), _layer()
    whole = partial(torch.compile, backend="eager", fullgraph=True)
    try:
        whole(lambda: dense.state_dict()["weight"] * 2)()
    except torch._dynamo.exc.Unsupported:
        pytest.skip(f"torch {torch.__version__} compiles no state_dict into one graph, of nn.Linear's neither")
    assert torch.equal(whole(lambda: layer.state_dict()["values"] * 2)(), layer.values * 2)


def test_memory_without_contents_is_filled_or_told_of() -> None:
    layer = _layer().to_empty(device="cpu")
    layer.topology_digest.zero_()
    with pytest.raises(RuntimeError, match=r"After to_empty\(\), load a checkpoint or call reset_parameters\(\)"):
        layer(torch.randn(3, 12))
    layer.reset_parameters()
    assert layer(torch.randn(3, 12)).isfinite().all()
    lost = _layer().to("meta").to_empty(device="cpu")
    lost.topology_digest.fill_(1)
    assert all(lost.state_dict()[name].is_meta for name in ("crow_indices", "col_indices"))  # names and shapes alone
    for use in (lost.reset_parameters, lambda: lost(torch.randn(3, 12))):
        lost.topology_digest.fill_(1)
        with pytest.raises(RuntimeError, match="left them on the meta device"):
            use()
    lost.load_state_dict(_layer().state_dict())
    assert torch.equal(lost.to_dense().weight, _layer().to_dense().weight)
