"""What int8 makes of weights: rows with a scale each, embeddings, and what casts leave of them."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from checkers import unit_roundoff
from offpath.nn import Int8Embedding, Int8SparseLinear, SparseLinear
from offpath.nn.quantise import quantise_rows

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


finite = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=60)
@given(st.lists(st.lists(finite, max_size=5), min_size=1, max_size=4))
def test_quantised_rows_are_within_half_a_scale(rows: list[list[float]]) -> None:
    weights = torch.tensor([w for row in rows for w in row], dtype=torch.float32)
    of_row = torch.tensor([i for i, row in enumerate(rows) for _ in row], dtype=torch.long)
    values, scales = quantise_rows(weights, of_row, len(rows))
    assert values.dtype is torch.int8 and scales.dtype is torch.float32 and bool((scales > 0).all())
    per_entry = scales.double()[of_row]
    # In float64, the quotient is rounded once, and the scale to float32: it can be that much too small for 127 of it.
    error = (weights.double() - values.double() * per_entry).abs()
    assert bool((error <= per_entry * (0.5 + 127 * unit_roundoff(torch.float32))).all())
    for i, row in enumerate(rows):
        if any(abs(w) > 1e-30 for w in row):
            assert values[of_row == i].abs().max() == 127


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_weights_that_no_scale_holds_are_refused_by_row(bad: float) -> None:
    sparse = SparseLinear(8, 6, sparsity=0.5, dtype=torch.float64)
    slot = int(sparse.crow_indices[4])
    sparse.values.data[slot] = bad
    row = int(sparse.pattern.row_indices()[slot])
    with pytest.raises(ValueError, match=f"1 rows, the first of which is row {row}"):
        Int8SparseLinear.from_sparse(sparse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_embedding_is_within_half_a_scale_of_the_original(dtype: torch.dtype) -> None:
    table = nn.Embedding(20, 12, padding_idx=3, dtype=dtype)
    small = Int8Embedding.from_dense(table)
    indices = torch.tensor([[0, 3, 19], [3, 3, 7]])
    rows, exact = small(indices), table(indices).detach()
    assert rows.dtype is dtype and rows.shape == exact.shape and not rows[indices == 3].any()
    scales = small.scales[indices].double().unsqueeze(-1)
    # Off by half a scale and the rounding of the scale; then rounded to float32 and to dtype.
    bound = scales * (0.5 + 127 * (2 * unit_roundoff(torch.float32) + unit_roundoff(dtype)))
    assert bool(((rows.double() - exact.double()).abs() <= bound).all())
    assert small.padding_idx == 3 and not list(small.parameters())


def test_an_embedding_follows_its_models_dtype_and_checkpoint() -> None:
    small = Int8Embedding.from_dense(nn.Embedding(20, 12))
    scales, indices = small.scales.clone(), torch.arange(5)
    expected = small(indices)
    other = Int8Embedding(20, 12)
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(indices), expected)
    assert torch.equal(torch.compile(small, fullgraph=True, backend="eager")(indices), expected)
    assert torch.equal(copy.deepcopy(small).bfloat16()(indices), expected.bfloat16())
    assert torch.equal(small.bfloat16().scales, scales)


def test_embeddings_that_do_more_than_read_are_refused() -> None:
    for option in ({"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}):
        with pytest.raises(ValueError, match=next(iter(option))):
            Int8Embedding.from_dense(nn.Embedding(4, 3, **option))
    table = nn.Embedding(4, 3)
    table.weight.data[2, 1] = torch.nan
    with pytest.raises(ValueError, match="row 2"):
        Int8Embedding.from_dense(table)


def test_weights_whose_rows_would_be_read_back_as_infinite_are_refused() -> None:
    largest = torch.finfo(torch.float32).max
    rows = torch.tensor([0, 0])
    for weights in (torch.tensor([1e40, -5e39], dtype=torch.float64), torch.tensor([largest, 1.0])):
        with pytest.raises(ValueError, match="1 rows, the first of which is row 0"):
            quantise_rows(weights, rows, 1)
    values, scales = quantise_rows(torch.tensor([largest * (1 - 2**-20), 1.0]), rows, 1)
    assert bool((values * scales).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float32], ids=str)
def test_casts_of_all_tensors_leave_whole_numbers(dtype: torch.dtype) -> None:
    layer, table = Int8SparseLinear.from_sparse(SparseLinear(70, 33)), Int8Embedding.from_dense(nn.Embedding(10, 4))
    expected, rows = layer.values.clone(), table.values.clone()
    layer.type(dtype)
    table.type(dtype)
    assert torch.equal(layer.values, expected) and layer.values.dtype is torch.int8
    assert torch.equal(table.values, rows) and table.values.dtype is torch.int8
    assert layer(torch.randn(2, 70, dtype=dtype)).dtype is table(torch.tensor([1])).dtype is dtype
