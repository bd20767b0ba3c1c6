"""`SparseRows` and what makes them: what they mean, whatever the entries, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from offpath import SparseLinear, kernels
from offpath.kernels import KernelError
from offpath.nn import SparseSparseLinear
from offpath.ops import SparseRows, above, batch_topk, encode_topk, topk_rows
from row_cases import BAD_ROWS

OPS = torch.ops.offpath
INF, NAN = float("inf"), float("nan")

pytestmark = pytest.mark.usefixtures("one_thread")
every_backend = pytest.mark.parametrize("name", list(kernels.backends()))

numbers = st.sampled_from([0.0, 1.0, 2.0, -1.0, -0.0, 0.5, INF, -INF, NAN, 1e-40])
tables = st.integers(0, 6).flatmap(
    lambda n: st.lists(st.lists(numbers, min_size=n, max_size=n), min_size=1, max_size=5)
)


def _order(x: float) -> float:
    """NaN after all numbers."""
    return math.inf if math.isnan(x) else x


def _largest(scores: list[float], k: int) -> list[int]:
    """The definition in plain Python: places of the k largest, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda i: (not math.isnan(scores[i]), -_order(scores[i]), i))[:k])


def _entries(rows: SparseRows) -> list[list[tuple[int, str]]]:
    """(index, value) of each row; the value as text, so that NaN equals NaN and -0.0 is not 0.0."""
    bounds = rows.crow_indices.tolist()
    pairs = list(zip(rows.indices.tolist(), map(repr, rows.values.tolist()), strict=True))
    return [pairs[a:b] for a, b in pairwise(bounds)]


@every_backend
@given(table=tables, share=st.floats(0, 1))
@settings(max_examples=40)
def test_selections_are_what_sorting_in_python_gives(name: str, table: list[list[float]], share: float) -> None:
    x = torch.tensor(table, dtype=torch.float64)
    columns, flat = x.shape[1], [score for row in table for score in row]
    k, of_all = round(share * columns), round(share * len(flat))
    threshold = [-1.0, 0.0, 1.0, -INF, INF, 0.5][:columns]
    with kernels.forced(name):
        top, batch, over = topk_rows(x, k), batch_topk(x, of_all), above(x, torch.tensor(threshold, dtype=x.dtype))
    assert _entries(top) == [[(i, repr(row[i])) for i in _largest(row, k)] for row in table]
    chosen = _largest(flat, of_all)
    assert _entries(batch) == [
        [(i, repr(row[i])) for i in range(columns) if r * columns + i in chosen] for r, row in enumerate(table)
    ]
    assert _entries(over) == [
        [(i, repr(s)) for i, s in enumerate(row) if s > threshold[i] or math.isnan(s)] for row in table
    ]


@every_backend
@given(seed=st.integers(0, 2**20), columns=st.integers(1, 9), counts=st.lists(st.integers(0, 5), max_size=7))
@settings(max_examples=40)
def test_products_are_those_of_the_dense_matrix(name: str, seed: int, columns: int, counts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    nnz = sum(counts)
    indices = torch.randint(columns, (nnz,), generator=generator).int()
    rows = SparseRows(torch.tensor([0, *counts]).cumsum(0).int(), indices, integers(nnz), columns)
    weight, dy, buffer = integers(columns, 5), integers(len(counts), 5), integers(columns, 5)
    with kernels.forced(name):
        dense = rows.to_dense()
        expected = torch.zeros(len(counts), columns)
        for row, entries in enumerate(_entries(rows)):
            for index, value in entries:
                expected[row, index] += float(value)
        assert torch.equal(dense, expected) and rows.shape == dense.shape and rows.nnz == nnz
        assert torch.equal(rows @ weight, dense @ weight)
        added = buffer.clone()
        rows.add_weight_gradient(dy, added)
        assert torch.equal(added, buffer + dense.t() @ dy)
        assert rows.counts().tolist() == [indices.tolist().count(i) for i in range(columns)]
        assert rows.live_counts().tolist() == [indices[rows.values != 0].tolist().count(i) for i in range(columns)]
        again = SparseRows.from_dense(dense)
        assert torch.equal(again.to_dense(), dense) and again.nnz == int((dense != 0).sum())
        assert rows.density == (nnz / dense.numel() if dense.numel() else 0.0)


def test_gradient_through_topk_and_relu_is_that_of_the_dense_one() -> None:
    x = torch.tensor([[3.0, -1.0, 2.0], [-5.0, -1.0, -2.0]], requires_grad=True)
    weight = torch.randint(-3, 4, (3, 4)).float()  # integers: sums are the same in every order
    (topk_rows(x, 2).relu() @ weight).sum().backward()
    live = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(x.grad, live * weight.sum(1), rtol=0, atol=0)


def test_nan_is_an_entry_and_its_gradient_goes_where_it_stands() -> None:
    x = torch.tensor([[0.0, NAN, -0.0], [NAN, 1.0, 2.0]], requires_grad=True)
    for rows in (SparseRows.from_dense(x), above(x), topk_rows(x, 1)):
        assert [[index for index, value in row if value == "nan"] for row in _entries(rows)] == [[1], [0]]
        (gradient,) = torch.autograd.grad(rows.values.sum(), x)
        assert gradient.tolist()[0] == [0.0, 1.0, 0.0]


def test_what_it_prints_and_what_it_carries() -> None:
    rows = SparseRows.from_topk(torch.ones(2, 3, requires_grad=True), torch.tensor([[0, 1, 2], [2, 4, 5]]), 8)
    assert repr(rows) == "SparseRows(shape=(2, 8), nnz=6, float32, 3 in a row)"
    assert rows.indices.dtype is torch.int32 and rows.density == 6 / 16
    assert not rows.detach().values.requires_grad and rows.values.requires_grad
    assert rows.to(torch.bfloat16).dtype is torch.bfloat16 and rows.device.type == "cpu"
    moved = rows.to("meta")
    assert {part.device.type for part in (moved.crow_indices, moved.indices, moved.values)} == {"meta"}
    empty = SparseRows.from_dense(torch.zeros(0, 4))
    assert repr(empty) == "SparseRows(shape=(0, 4), nnz=0, float32, 0 in a row)" and empty.density == 0.0
    assert (empty @ torch.ones(4, 3)).shape == (0, 3)


CROW, INDICES = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([1, 0, 1], dtype=torch.int32)
ROWS = SparseRows(CROW, INDICES, torch.ones(3), 2)
X = torch.ones(2, 6)

REFUSED: dict[str, Callable[[], object]] = {
    "crow_indices of 64 bits": lambda: SparseRows(CROW.long(), INDICES, torch.ones(3), 2),
    "no crow_indices": lambda: SparseRows(CROW[:0], INDICES, torch.ones(3), 2),
    "indices of 64 bits": lambda: SparseRows(CROW, INDICES.long(), torch.ones(3), 2),
    "values of integers": lambda: SparseRows(CROW, INDICES, torch.ones(3).int(), 2),
    "fewer values than indices": lambda: SparseRows(CROW, INDICES, torch.ones(2), 2),
    "indices of two dimensions": lambda: SparseRows(CROW, INDICES[None], torch.ones(1, 3), 2),
    "values and indices of different shapes": lambda: SparseRows.from_topk(X, torch.ones(2, 5).long(), 9),
    "more than 2^31 - 1 entries": lambda: SparseRows.from_topk(
        torch.ones(1).expand(2**16, 2**15), torch.zeros(1).long().expand(2**16, 2**15), 9
    ),
    "more than 2^31 - 1 of the largest": lambda: topk_rows(torch.ones(1, 1).expand(2**16, 2**15), 2**15),
    "columns that no index can name": lambda: OPS.rows_weight_gradient(
        torch.ones(3), CROW, INDICES, torch.ones(2, 4), 2**62
    ),
    "indices that are no integers": lambda: SparseRows.from_topk(torch.ones(2, 1), torch.ones(2, 1), 9),
    "an index that int32 cannot hold": lambda: SparseRows.from_topk(
        torch.ones(1, 1), torch.tensor([[2**32]]), 3
    ).to_dense(),
    "scores of one dimension": lambda: above(X[0]),
    "nonzeros of one dimension": lambda: SparseRows.from_dense(X[0]),
    "scores that are one number": lambda: topk_rows(X[0, 0], 1),
    "thresholds of two dimensions": lambda: above(X, torch.ones(2, 6)),
    "a weight on another device": lambda: ROWS @ torch.ones(2, 4, device="meta"),
    "a weight on another device, with gradients": lambda: ROWS @ torch.ones(2, 4, device="meta", requires_grad=True),
    "an encoder on another device": lambda: encode_topk(X, torch.ones(4, 6, device="meta"), None, 2),
    "a weight of other rows": lambda: ROWS @ torch.ones(3, 4),
    "a weight of another dtype": lambda: ROWS @ torch.ones(2, 4).double(),
    "a weight of one dimension": lambda: ROWS @ torch.ones(2),
    "a buffer of other rows": lambda: ROWS.add_weight_gradient(torch.ones(2, 4), torch.ones(3, 4)),
    "a buffer of another width": lambda: ROWS.add_weight_gradient(torch.ones(2, 4), torch.ones(2, 3)),
    "a buffer of another dtype": lambda: ROWS.add_weight_gradient(torch.ones(2, 4), torch.ones(2, 4).double()),
    "dy of other rows": lambda: ROWS.add_weight_gradient(torch.ones(3, 4), torch.ones(2, 4)),
    "dy of another dtype": lambda: OPS.rows_weight_gradient(torch.ones(3), CROW, INDICES, torch.ones(2, 4).half(), 2),
    "dots of different widths": lambda: OPS.rows_dots(torch.ones(2, 4), CROW, INDICES, torch.ones(2, 3)),
    "dots of different dtypes": lambda: OPS.rows_dots(torch.ones(2, 4), CROW, INDICES, torch.ones(2, 4).double()),
    "values that are not there": lambda: OPS.rows_matmul(torch.ones(2), CROW, INDICES, torch.ones(2, 4)),
    "k over n": lambda: topk_rows(X, 7),
    "k below 0": lambda: topk_rows(X, -1),
    "k over all": lambda: batch_topk(X, 13),
    "k over the latents": lambda: encode_topk(X, torch.ones(4, 6), None, 5),
    "scores of three dimensions": lambda: topk_rows(torch.ones(2, 3, 4), 1),
    "thresholds too few": lambda: OPS.above(X, torch.ones(5)),
    "thresholds of another dtype": lambda: OPS.above(X, torch.ones(6).double()),
    "an encoder of another width": lambda: encode_topk(X, torch.ones(4, 5), None, 2),
    "an encoder of another dtype": lambda: encode_topk(X, torch.ones(4, 6).double(), None, 2),
    "a bias too short": lambda: encode_topk(X, torch.ones(4, 6), torch.ones(3), 2),
    "a bias of another dtype": lambda: encode_topk(X, torch.ones(4, 6), torch.ones(4).double(), 2),
}


@every_backend
def test_what_does_not_fit_is_refused_by_every_backend(name: str) -> None:
    taken = []
    with kernels.forced(name):
        for misfit, call in REFUSED.items():
            try:
                call()
                taken.append(misfit)
            except KernelError as error:
                assert "expected" in str(error) and "got" in str(error)
    assert taken == []


@every_backend
def test_every_method_refuses_entries_that_are_nowhere(name: str) -> None:
    for bad, (crow_indices, indices, columns) in BAD_ROWS.items():
        rows = SparseRows(crow_indices, indices, torch.ones(indices.shape[0]), columns)
        weight, buffer, dy = torch.ones(columns, 3), torch.ones(columns, 3), torch.ones(rows.shape[0], 3)
        calls: list[Callable[[], object]] = [
            partial(rows.matmul, weight),
            partial(rows.add_weight_gradient, dy, buffer),
        ]
        if bad.startswith("index"):
            calls += [rows.to_dense, rows.counts, rows.live_counts]
        with kernels.forced(name):
            for call in calls:
                with pytest.raises(KernelError, match="expected"):
                    call()
        assert torch.equal(buffer, torch.ones(columns, 3))


def test_no_kernel_for_a_dtype_raises_instead_of_falling_back() -> None:
    for call in (lambda: topk_rows(X.half(), 2), lambda: batch_topk(X.half(), 2), lambda: above(X.half())):
        with pytest.raises(KernelError, match=r"no kernels for torch\.float16"):
            call()


def test_views_that_are_to_be_negated_are_read_with_their_sign() -> None:
    x = torch._neg_view(torch.eye(3))
    layers = SparseLinear(3, 4, density=0.7), SparseSparseLinear(3, 4, density=0.7)
    with torch.no_grad():
        for layer in layers:
            assert torch.equal(layer(x), layer(-torch.eye(3)))
        rows = SparseRows.from_dense(-torch.eye(3))
        negated = rows.with_values(torch._neg_view(torch.ones(3)))
        assert torch.equal(layers[1](negated), layers[1](rows))


def test_inference_mode_gives_the_same_entries() -> None:
    x, weight = torch.randn(3, 6), torch.randn(9, 6)
    with torch.inference_mode():
        rows = encode_topk(x, weight, None, 2)
    assert _entries(rows) == _entries(encode_topk(x, weight, None, 2))
