"""`SparseSparseLinear` against `SparseLinear`."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from offpath import SparseLinear
from offpath.kernels import KernelError
from offpath.nn import SparseSparseLinear
from offpath.ops import SparseRows, forced_dense_rows, sparse_matmul, topk_rows
from offpath.pattern import PatternError

pytestmark = pytest.mark.usefixtures("one_thread")


def _layers(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[SparseLinear, SparseSparseLinear]:
    """The same small integers in both: every order of summation gives the same bits."""
    generator = torch.Generator().manual_seed(3)
    layer = SparseLinear(9, 5, bias, dtype=dtype, density=0.4, generator=generator)
    for parameter in layer.parameters():
        parameter.data = torch.randint(-4, 5, parameter.shape, generator=generator).to(dtype)
    return layer, SparseSparseLinear.from_sparse_linear(layer)


def _input(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(-4, 5, (7, 9), generator=generator) * (torch.rand(7, 9, generator=generator) < 0.4)
    x[2] = 0  # a sample without a live unit
    return x.to(dtype)


@pytest.fixture(params=[False, True], ids=["live connections", "all connections"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    with forced_dense_rows(request.param):
        yield


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_computes_and_trains_as_sparse_linear(dtype: torch.dtype, bias: bool, way: None) -> None:
    (theirs, layer), dense = _layers(bias, dtype), _input(dtype)
    for x in (SparseRows.from_dense(dense), dense):
        layer.zero_grad()
        theirs.zero_grad()
        y, expected = layer(x), theirs(dense)
        assert torch.equal(y, expected)
        dy = torch.arange(35).view(7, 5).remainder(5).to(dtype)
        y.backward(dy)
        expected.backward(dy)
        gradient = layer.pattern.to_dense(layer.values.grad)
        assert torch.equal(gradient, theirs.pattern.to_dense(theirs.values.grad).t())
        assert not bias or torch.equal(layer.bias.grad, theirs.bias.grad)
        with torch.no_grad():
            assert torch.equal(layer(x), expected)


def test_a_dense_input_keeps_its_leading_dimensions_and_its_zeros_get_no_gradient(way: None) -> None:
    (theirs, layer), x = _layers(), _input().view(1, 7, 9).requires_grad_()
    y = layer(x)
    assert torch.equal(y, theirs(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(theirs(x).sum(), x)
    assert torch.equal(gradient, torch.where(x != 0, expected, 0))


def test_gradcheck(way: None) -> None:
    torch.manual_seed(0)
    layer = SparseSparseLinear(5, 3, dtype=torch.float64, density=0.5)
    rows = topk_rows(torch.randn(4, 5, dtype=torch.float64), 2)

    def run(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"values": weight, "bias": bias}, rows.with_values(values))

    def run_dense(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        dense = rows.with_values(values).to_dense()
        return torch.func.functional_call(layer, {"values": weight, "bias": bias}, dense)

    leaves = (rows.values.requires_grad_(), layer.values, layer.bias)
    for function in (run, run_dense):
        assert torch.autograd.gradcheck(function, leaves) and torch.autograd.gradgradcheck(function, leaves)


def test_layer_compiles_without_graph_breaks() -> None:
    _, layer = _layers()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in (_input(), _input().roll(1, 1)):
        rows = SparseRows.from_dense(x)
        result, expected = compiled(rows), layer(rows)
        assert torch.equal(result, expected)
        gradients, others = (torch.autograd.grad(y.sum(), list(layer.parameters())) for y in (result, expected))
        assert all(map(torch.equal, gradients, others))


def test_there_and_back_is_the_same_layer_in_other_memory() -> None:
    theirs, _ = _layers(dtype=torch.bfloat16)
    theirs.eval().values.requires_grad_(False)
    back = SparseSparseLinear.from_sparse_linear(theirs).to_sparse_linear()
    assert back.pattern.equals(theirs.pattern) and torch.equal(back.values, theirs.values)
    assert back.values.dtype is torch.bfloat16 and not back.values.requires_grad and not back.training
    assert back.bias.requires_grad and torch.equal(back.bias, theirs.bias)
    assert back.values.data_ptr() != theirs.values.data_ptr() and back.bias.data_ptr() != theirs.bias.data_ptr()
    linear = nn.Linear(4, 3)
    linear.weight.data[1].zero_()
    layer = SparseSparseLinear.from_linear(linear)
    assert layer.nnz == 8 and torch.equal(layer.to_sparse_linear().to_dense().weight, linear.weight)


def test_initial_values_are_scaled_by_the_live_fan_in_of_the_output() -> None:
    layer = SparseSparseLinear(400, 50, density=0.2, generator=torch.Generator().manual_seed(0))
    fan_in = torch.bincount(layer.row_indices, minlength=50)
    scaled = layer.values.detach() * fan_in[layer.row_indices.long()].sqrt()
    assert layer.nnz == 4000 and 0.98 < scaled.abs().max() <= 1
    assert bool((layer.bias.detach().abs() <= fan_in.rsqrt()).all())


def test_copies_and_checkpoints_carry_the_topology() -> None:
    _, layer = _layers()
    x = SparseRows.from_dense(_input())
    other = SparseSparseLinear(9, 5, density=0.7)
    other.load_state_dict(layer.state_dict())
    assert set(layer.state_dict()) == {"values", "bias", "ccol_indices", "row_indices"}
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert same.pattern.equals(layer.pattern) and torch.equal(same(x), layer(x))
        same.values.data += 1
    assert torch.equal(layer(x), _layers()[1](x))


def test_checkpoints_of_the_other_orientation_are_refused_and_change_nothing() -> None:
    """In a square layer the arrays of both have the same sizes."""
    layer, theirs = SparseSparseLinear(6, 6, density=0.5), SparseLinear(6, 6, density=0.5)
    for into, state in ((layer, theirs.state_dict()), (theirs, layer.state_dict())):
        before = copy.deepcopy(into.state_dict())
        with pytest.raises(RuntimeError, match="is missing"):
            into.load_state_dict(state)
        assert all(torch.equal(into.state_dict()[name], before[name]) for name in before)


def test_what_does_not_fit_is_refused() -> None:
    _, layer = _layers()
    x = SparseRows.from_dense(_input())
    for bad in (torch.ones(2, 8), SparseRows.from_dense(torch.ones(2, 8)), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="of 9 features, got shape"):
            layer(bad)
    with pytest.raises(KernelError, match=r"expected a weight of torch\.float64"):
        layer(x.to(torch.float64))
    with pytest.raises(ValueError, match=r"shape \(in, out\) = \(9, 5\)"):
        SparseSparseLinear(9, 5, pattern=_layers()[0].pattern)
    outside = SparseRows(x.crow_indices, x.indices + 9, x.values, 9)
    with pytest.raises(KernelError, match=r"expected indices in \[0, 9\)"):
        layer(outside)
    with pytest.raises(KernelError, match="expected a weight of 9 inputs"):
        sparse_matmul(x, layer.values, layer.ccol_indices[:-1], layer.row_indices, 5)
    with pytest.raises(PatternError, match="columns in"):
        sparse_matmul(x, layer.values, layer.ccol_indices, layer.row_indices + 3, 5)


def test_autocast_computes_as_a_layer_of_its_dtype() -> None:
    (_, layer), (_, half) = _layers(), _layers(dtype=torch.bfloat16)
    x = _input()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(SparseRows.from_dense(x))
    assert y.dtype is torch.bfloat16 and torch.equal(y, half(SparseRows.from_dense(x.bfloat16())))


@pytest.mark.parametrize(("features", "rows"), [((0, 3), 2), ((3, 0), 2), ((4, 4), 0)])
def test_thin_and_empty_layers_work(features: tuple[int, int], rows: int) -> None:
    layer = SparseSparseLinear(*features, density=1)
    y = layer(torch.ones(rows, features[0]))
    assert y.shape == (rows, features[1])
    y.sum().backward()
    assert layer.values.grad.shape == layer.values.shape
