"""`SparseInputLinear` against `nn.Linear`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from offpath.nn import SparseInputLinear, TopK
from offpath.ops import SparseRows, topk_rows


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [True, False])
def test_computes_what_linear_does(rows: bool, bias: bool) -> None:
    """Small integers: every order of summation gives the same bits."""
    torch.manual_seed(0)
    linear = nn.Linear(9, 5, bias)
    for parameter in linear.parameters():
        parameter.data = torch.randint(-4, 5, parameter.shape).float()
    layer = SparseInputLinear.from_linear(linear)
    dense = torch.randint(-4, 5, (7, 9)).float() * (torch.rand(7, 9) < 0.4)
    dense[2] = 0  # a sample without a live unit
    dy = torch.randint(-4, 5, (7, 5)).float()
    x = SparseRows.from_dense(dense) if rows else dense
    y = layer(x)
    assert torch.equal(y, linear(dense))
    y.backward(dy)
    linear(dense).backward(dy)
    assert torch.equal(layer.weight_t.grad, linear.weight.grad.t())
    assert not bias or torch.equal(layer.bias.grad, linear.bias.grad)
    assert layer.weight_t.is_contiguous() and layer.to_linear().weight.is_contiguous()


def test_other_layers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"expected nn\.Linear, got Conv1d"):
        SparseInputLinear.from_linear(nn.Conv1d(3, 4, 1))


def test_gradcheck() -> None:
    torch.manual_seed(0)
    layer = SparseInputLinear(5, 3, dtype=torch.float64)
    rows = topk_rows(torch.randn(4, 5, dtype=torch.float64), 2)

    def run(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"weight_t": weight, "bias": bias}, rows.with_values(values))

    assert torch.autograd.gradcheck(run, (rows.values.requires_grad_(), layer.weight_t, layer.bias))


def test_there_and_back_shares_no_memory() -> None:
    linear = nn.Linear(4, 3, dtype=torch.bfloat16).eval()
    linear.weight.requires_grad_(False)
    layer = SparseInputLinear.from_linear(linear)
    back = layer.to_linear()
    for module in (layer, back):
        assert not module.training and next(module.parameters()).dtype is torch.bfloat16
        assert [p.requires_grad for p in module.parameters()] == [False, True]
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    assert all(torch.equal(before[name], value) for name, value in back.state_dict().items())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    for module in (linear, back):
        assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_state_dict_of_linear_loads_and_a_square_one_not_the_wrong_way_round() -> None:
    model, old = nn.Sequential(SparseInputLinear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    checkpoint = old.state_dict()
    assert model.load_state_dict(checkpoint) == ([], [])
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), old(x))
    assert list(checkpoint) == ["0.weight", "0.bias"], "the caller's dictionary is as it was"
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(nn.Sequential(nn.Linear(5, 4)).state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        old.load_state_dict(model.state_dict())


def test_state_dict_deepcopy_and_pickle() -> None:
    layer = SparseInputLinear(6, 2)
    rows = TopK(2)(torch.randn(3, 6))
    loaded = SparseInputLinear(6, 2)
    loaded.load_state_dict(layer.state_dict())
    for other in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(rows), layer(rows))


def test_initial_values_are_distributed_as_those_of_linear() -> None:
    torch.manual_seed(0)
    layer, linear = SparseInputLinear(100, 400), nn.Linear(100, 400)
    for a, b in ((layer.weight_t, linear.weight), (layer.bias, linear.bias)):
        assert a.abs().max() <= 0.1 and b.abs().max() <= 0.1
        # The standard deviation of n draws from U(-0.1, 0.1) is known to 0.45 / sqrt(n); five of these never happen.
        assert abs(a.std().item() / (0.1 / 3**0.5) - 1) < 5 * 0.45 / a.numel() ** 0.5
    assert SparseInputLinear(0, 3).weight_t.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    layer = SparseInputLinear(6, 2, dtype=dtype)
    y = layer(TopK(2)(torch.randn(3, 6, dtype=dtype)))
    y.sum().backward()
    assert y.dtype is dtype and layer.weight_t.grad.dtype is dtype


def test_autocast_multiplies_as_linear_does() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 4)
    layer = SparseInputLinear.from_linear(linear)
    dense = TopK(3, output="dense")(torch.randn(5, 8))
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(SparseRows.from_dense(dense)), linear(dense)
    assert y.dtype is expected.dtype is torch.bfloat16
    # Both operands are rounded alike; then each side sums at most four terms in float32 and rounds to bfloat16, ours
    # once more before the bias is added: 3 * 2^-8 of what the terms and the partial sums can be in size.
    size = dense.bfloat16().double().abs() @ layer.weight_t.detach().bfloat16().double().abs() + layer.bias.abs()
    assert ((y.double() - expected.double()).abs() <= 3 * 2**-8 * size * (1 + 2**-6)).all()
    y.float().sum().backward()
    assert layer.weight_t.grad.dtype is torch.float32


def test_no_samples_and_wrong_widths() -> None:
    layer = SparseInputLinear(4, 3)
    y = layer(TopK(2)(torch.ones(0, 4)))
    y.sum().backward()
    assert y.shape == (0, 3) and not layer.weight_t.grad.any()
    for wrong in (TopK(2)(torch.ones(2, 5)), torch.ones(2, 5), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="of 4 features"):
            layer(wrong)
