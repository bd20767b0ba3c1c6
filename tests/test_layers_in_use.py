"""What people do around a layer: in-place functions, masks, other connections, inference mode, default devices."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import offpath
from children import environment
from offpath import SparseLinear, SparseRows, nn as layers, ops, pattern as patterns
from offpath.convert.compress.verify import right_output
from offpath.cost.bounds import excess
from offpath.kernels import KernelError
from offpath.kernels.methods import METHODS


def _x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# --- In-place functions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS["forward"])
@pytest.mark.parametrize("shape", [(20,), (5, 20), (2, 3, 20), (2, 3, 4, 20)], ids=str)
@pytest.mark.parametrize("feature_major", [False, True])
def test_what_follows_may_work_in_place(method: str, shape: tuple[int, ...], feature_major: bool) -> None:
    layer = SparseLinear(20, 20, sparsity=0.5)
    layer.feature_major, dense = feature_major, layer.to_dense()
    for wants_dx in (False, True):
        results = []
        for one in (layer, dense):
            x = _x(*shape).requires_grad_(wants_dx)
            with ops.forced_methods(forward=method):
                y = one(x)
            y += 0.5
            nn.functional.relu_(y).sum().backward()
            results.append([y, *([x.grad] if wants_dx else [])])
        for got, right in zip(*results, strict=True):
            torch.testing.assert_close(got, right)


IN_PLACE: dict[str, Callable[[], Tensor]] = {
    "convolution": lambda: layers.SparseConv2d(4, 8, 3)(_x(2, 4, 9, 9)),
    "pointwise convolution": lambda: layers.SparseConv2d(4, 8, 1)(_x(2, 4, 9, 9)),
    "one image": lambda: layers.SparseConv2d(4, 8, 3)(_x(4, 9, 9)),
    "convolution of signals": lambda: layers.SparseConv1d(4, 8, 3)(_x(2, 4, 9)),
    "sparse input": lambda: layers.SparseInputLinear(20, 8)(ops.topk_rows(_x(3, 20), 2)),
    "sparse both": lambda: layers.SparseSparseLinear(20, 8, bias=False)(_x(2, 3, 20).relu()),
    "encode_topk": lambda: ops.encode_topk(_x(3, 20).requires_grad_(), _x(30, 20), None, 2).values,
    **{
        f"autoencoder, {activation}": lambda activation=activation: (
            layers.SparseAutoencoder(20, 80, 4, activation).encode(_x(3, 20)).values
        )
        for activation in ("batch_topk", "jumprelu")  # those of topk are what a ReLU keeps
    },
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_other_layers_may_be_followed_by_what_works_in_place(name: str) -> None:
    result = IN_PLACE[name]()
    result.mul_(2).add_(1)
    if result.requires_grad:
        result.sum().backward()


def test_fused_layers_may_have_an_in_place_activation_between_them() -> None:
    model = nn.Sequential(SparseLinear(64, 64), nn.ReLU(inplace=True), SparseLinear(64, 8))
    right = model(_x(40, 64))
    with ops.forced_methods(forward="bucketed", dx="bucketed", dvalues="tiled"):
        assert offpath.fuse(model)
        y = model(_x(40, 64))
        y.sum().backward()
    torch.testing.assert_close(y, right)


def test_a_buffer_that_is_added_to_counts_it_for_autograd() -> None:
    rows = SparseRows.from_topk(torch.ones(2, 2), torch.tensor([[0, 1], [1, 2]]), 5)
    buffer = torch.zeros(5, 2, requires_grad=True) + 1
    squares = (buffer * buffer).sum()
    rows.add_weight_gradient(torch.ones(2, 2), buffer.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()
    with torch.inference_mode():
        rows.add_weight_gradient(torch.ones(2, 2), torch.zeros(5, 2))


# --- Masks, and other connections -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: SparseLinear(20, 30, sparsity=0.5),
        lambda: layers.SparseSparseLinear(20, 30, sparsity=0.5),
        lambda: layers.SparseConv2d(5, 6, 3, sparsity=0.5),
    ],
)
def test_a_masked_layer_takes_over_the_connections_of_another_one(make: Callable[[], nn.Module]) -> None:
    one, other = make(), make()
    for layer in (one, other):
        prune.l1_unstructured(layer, "values", 0.2)
    x = _x(4, 5, 6, 6) if isinstance(one, layers.SparseConv2d) else _x(4, 20).relu()
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x), one(x)) and other.pattern.equals(one.pattern)


def test_a_masked_layer_of_another_size_is_left_as_it_was() -> None:
    one, other = SparseLinear(20, 30, sparsity=0.5), SparseLinear(20, 30, sparsity=0.7)
    for layer in (one, other):
        prune.identity(layer, "values")
    before, x = other.pattern, _x(4, 20)
    y = other(x)
    with pytest.raises(
        RuntimeError, match=r"expected 180 connections, as many as values_orig and values_mask are for, got 300"
    ):
        other.load_state_dict(one.state_dict())
    assert other.pattern.equals(before) and torch.equal(other(x), y)
    without = {name: value for name, value in other.state_dict().items() if name != "col_indices"}
    with pytest.raises(RuntimeError, match="the topology that they belong to, but col_indices is missing"):
        other.load_state_dict(without)
    with pytest.raises(patterns.PatternError, match=r"prune\.remove"):
        layers.rewire(other, patterns.edit(before, torch.arange(5)))


def test_a_graph_from_before_other_connections_is_refused() -> None:
    """Also where the layer's input needs no gradient, so that the values were not saved."""
    x = _x(3, 20)
    layer, other = SparseLinear(20, 30, sparsity=0.5), SparseLinear(20, 30, sparsity=0.5)

    def rewired() -> None:
        layers.rewire(layer, patterns.edit(layer.pattern, torch.arange(5)))

    for change in (rewired, lambda: layer.load_state_dict(other.state_dict())):
        y = layer(x).sum()
        change()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()
        layer(x).sum().backward()
        layer.zero_grad()
    y = layer(x).sum()
    layer.load_state_dict(layer.state_dict())  # the same connections
    y.backward()


def test_grown_values_may_have_another_dtype() -> None:
    layer = SparseLinear(4, 3, sparsity=0.5, dtype=torch.bfloat16)
    free = (layer.pattern.to_mask() == 0).nonzero()[0]
    edit = patterns.edit(layer.pattern, torch.arange(1), (free[:1], free[1:]))
    layers.rewire(layer, edit, torch.tensor([2.5]))
    assert layer.values[edit.grown_slots].tolist() == [2.5]


def test_positions_that_do_not_ascend_are_refused() -> None:
    for positions in ([3, 1], [1, 1]):
        with pytest.raises(patterns.PatternError, match="expected ascending positions"):
            patterns.from_positions(torch.tensor(positions), (2, 3))


# --- Modes and dtypes -------------------------------------------------------------------------------------------------


def test_what_is_loaded_in_inference_mode_can_be_trained() -> None:
    layer, other = SparseLinear(20, 30, sparsity=0.5), SparseLinear(20, 30, sparsity=0.5)
    with torch.inference_mode():
        layer.load_state_dict(other.state_dict())
    layer(_x(3, 20)).sum().backward()


def test_a_threshold_of_a_number_lets_through_what_is_larger() -> None:
    x = torch.tensor([[0.10009765625]]).bfloat16()
    assert ops.above(x, 0.1).nnz == ops.above(x, torch.tensor(0.1)).nnz == 1
    assert ops.above(x, 0.10009765625).nnz == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_autocast_takes_no_numbers_that_are_not_real(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(KernelError, match="x and values of one dtype"):
        SparseLinear(20, 30)(torch.ones(2, 20, dtype=dtype))


def test_the_batch_of_a_dense_input_of_sparse_both_is_dynamic() -> None:
    layer, x = layers.SparseSparseLinear(20, 30, sparsity=0.5).eval(), _x(8, 20).relu()
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    right = right_output(layer.to_sparse_linear().to_dense(), x[:3])
    assert excess(exported(x[:3]).detach(), right) is None  # an eager layer may add up in another order


ELSEWHERE = """
import sys, torch
from pathlib import Path
from torch import nn
import offpath
from offpath import nn as layers, ops

torch.set_default_device("meta")
on_cpu = {"device": "cpu"}
x = torch.ones(20, 16, **on_cpu)
layer = offpath.SparseLinear(16, 8, **on_cpu)
layers.SparseSparseLinear(16, 8, **on_cpu)(ops.topk_rows(x, 2))
layers.SparseConv2d(4, 8, 3, **on_cpu)(torch.ones(2, 4, 9, 9, **on_cpu))
ops.topk_rows(x, 2) @ torch.ones(16, 3, **on_cpu)
model = nn.Sequential(nn.Linear(16, 8, **on_cpu))
offpath.sparsify(model, 0.5, seed=0)
path = Path(sys.argv[1]) / "model.safetensors"
offpath.save(model, path)
print(layer(x).device, offpath.load(path, model=model)[0].values.device)
"""


def test_tensors_of_the_cpu_stay_there_where_another_device_is_the_default(tmp_path: Path) -> None:
    """Kernels are measured there as well: each of these has no costs yet."""
    own = environment() | {"OFFPATH_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path)]
    run = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["cpu", "cpu"]


def test_a_cast_of_all_tensors_leaves_counts() -> None:
    sae = layers.SparseAutoencoder(20, 40, 4, "batch_topk").type(torch.float64)
    assert sae.loss(_x(8, 20).double()).total.dtype is torch.float64


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of sizes, which are compared as numbers
@pytest.mark.parametrize(
    "make",
    [
        lambda: SparseLinear(20, 30, sparsity=0.5),
        lambda: layers.TopK(2, output="dense"),
        lambda: nn.Sequential(layers.TopK(2), layers.SparseInputLinear(20, 5)),
        lambda: layers.SparseAutoencoder(20, 40, 4),
    ],
    ids=["linear", "topk", "rows", "autoencoder"],
)
def test_a_trace_in_grad_mode_can_be_saved(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    layer, x = make(), _x(4, 20)
    torch.jit.trace(layer, x).save(tmp_path / "traced.pt")
    assert torch.equal(torch.jit.load(tmp_path / "traced.pt")(x), layer(x))


@pytest.mark.long
def test_an_aotinductor_package_computes_what_the_layer_does(tmp_path: Path) -> None:
    layer, x = SparseLinear(20, 30, sparsity=0.5), _x(4, 20)
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
        assert torch.equal(torch._inductor.aoti_load_package(package)(x), layer(x))


def test_only_so_many_choices_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offpath.ops.prepared_products.CHOICES_KEPT", 4)
    monkeypatch.setattr("offpath.ops.prepared_convolutions.CHOICES_KEPT", 4)
    linear, convolution = SparseLinear(20, 30), layers.SparseConv2d(3, 4, 3)
    with torch.no_grad():
        for batch in range(1, 12):
            linear(_x(batch, 20))
            convolution(_x(batch, 3, 5, 5))
            assert 1 <= len(linear.connections._prepared._chosen) <= 4
            assert 1 <= len(convolution.connections._prepared.convolutions._pays_densely) <= 4
