"""`offpath.nn.rewire`: other connections, the same layer."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from offpath import SparseLinear, nn as offnn, pattern as patterns
from offpath.pattern import Edit, PatternError


def _layer(dtype: torch.dtype = torch.float32, seed: int = 0) -> SparseLinear:
    generator = torch.Generator().manual_seed(seed)
    return SparseLinear(6, 5, density=0.4, dtype=dtype, generator=generator)


def _edit(layer: SparseLinear, dropped: int, grown: int, seed: int = 0) -> Edit:
    generator = torch.Generator().manual_seed(seed)
    pattern = layer.pattern
    free = (~pattern.to_mask()).nonzero()
    rows, columns = free[torch.randperm(len(free), generator=generator)[:grown]].unbind(1)
    return patterns.edit(pattern, torch.randperm(pattern.nnz, generator=generator)[:dropped], (rows, columns))


def _spread(layer: SparseLinear, slots: Tensor) -> Tensor:
    return layer.pattern.to_dense(slots)


@given(st.integers(0, 12), st.integers(0, 18), st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))
def test_survivors_keep_value_and_gradient_and_grown_ones_begin_with_zero(
    dropped: int, grown: int, seed: int, dtype: torch.dtype
) -> None:
    layer = _layer(dtype, seed)
    layer.values.grad = torch.randn(12, generator=torch.Generator().manual_seed(seed)).to(dtype)
    values, gradient = (_spread(layer, t.detach().clone()) for t in (layer.values, layer.values.grad))
    change, parameter = _edit(layer, dropped, grown, seed), layer.values

    offnn.rewire(layer, change)

    survivors = torch.zeros(5, 6, dtype=torch.bool)
    kept = change.new_to_old >= 0
    survivors[change.pattern.row_indices()[kept].long(), change.pattern.col_indices[kept].long()] = True
    assert layer.values is parameter and layer.values.grad is not None
    assert layer.pattern.equals(change.pattern) and layer.nnz == 12 - dropped + grown
    assert torch.equal(_spread(layer, layer.values.detach()), values * survivors)
    assert torch.equal(_spread(layer, layer.values.grad), gradient * survivors)
    assert layer.values.dtype == layer.values.grad.dtype == dtype


@pytest.mark.parametrize(("dropped", "grown"), [(4, 4), (4, 0), (0, 4)])
def test_a_rewired_layer_computes_trains_and_keeps_its_state(dropped: int, grown: int) -> None:
    layer = _layer(torch.float64).eval()
    layer.bias.requires_grad_(False)
    x = torch.randn(3, 6, dtype=torch.float64)
    layer(x).sum().backward()  # plans for the old connections exist now
    offnn.rewire(layer, _edit(layer, dropped, grown))
    layer.zero_grad()
    dense = layer.to_dense()
    for module in (layer, dense):
        module(x).square().sum().backward()
    torch.testing.assert_close(layer(x), dense(x))
    pattern = layer.pattern
    torch.testing.assert_close(
        layer.values.grad, dense.weight.grad[pattern.row_indices().long(), pattern.col_indices.long()]
    )
    assert not layer.training and layer.values.requires_grad and not layer.bias.requires_grad
    assert copy.deepcopy(layer).pattern.equals(pattern)


def test_frozen_values_stay_frozen_and_the_same_count_stays_in_its_memory() -> None:
    layer = _layer()
    layer.values.requires_grad_(False)
    address = layer.values.data_ptr()
    offnn.rewire(layer, _edit(layer, 5, 5))
    assert not layer.values.requires_grad and layer.values.data_ptr() == address
    offnn.rewire(layer, _edit(layer, 5, 0))
    assert not layer.values.requires_grad and layer.values.grad is None


def test_grown_connections_take_the_values_they_are_given() -> None:
    layer = _layer()
    change = _edit(layer, 3, 5)
    offnn.rewire(layer, change, torch.arange(1.0, 6.0))
    assert layer.values[change.grown_slots].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("dropped", "grown"), [(4, 4), (4, 0)])
def test_a_graph_from_before_cannot_be_run_backward(dropped: int, grown: int) -> None:
    layer = _layer()
    loss = layer(torch.randn(3, 6, requires_grad=True)).sum()
    offnn.rewire(layer, _edit(layer, dropped, grown))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "grown", "message"),
    [
        (lambda layer: _edit(SparseLinear(5, 6, density=0.4), 1, 1), None, "expected an edit of a 5 x 6 pattern of 12"),
        (lambda layer: _edit(SparseLinear(6, 5, density=0.5), 1, 1), None, "of 12 connections, got one .* of 15"),
        (lambda layer: _edit(_layer(seed=1), 1, 1), None, "made from other connections"),
        (lambda layer: _edit(layer, 1, 2), torch.zeros(1), "a value for each of the 2 grown connections"),
    ],
    ids=["shape", "nnz", "pattern", "grown"],
)
def test_an_edit_that_does_not_fit_is_refused_and_changes_nothing(change, grown, message: str) -> None:
    layer = _layer()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(PatternError, match=message):
        offnn.rewire(layer, change(layer), grown)
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())
