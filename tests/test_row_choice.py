"""Products on sparse rows that are computed densely: the same numbers, where it pays, and by what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from offpath import kernels
from offpath.kernels import KernelError, row_calibration, visit_calibration
from offpath.nn import SparseSparseLinear
from offpath.ops import SparseRows, forced_dense_rows, row_choice, row_products, topk_rows
from offpath.ops.prepared_products import Prepared

BACKEND = kernels.default_backend()[0]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFPATH_CACHE_DIR", str(tmp_path))
    row_calibration._break_evens.cache_clear()
    yield tmp_path
    row_calibration._break_evens.cache_clear()


def test_an_autocast_rounds_neither_way() -> None:
    """Which way is taken depends on the density: the dtype and the numbers must not."""
    values, indices = torch.randn(5, 4, requires_grad=True), torch.randint(0, 7, (5, 4))
    weight = torch.randn(7, 9, requires_grad=True)
    found = []
    for dense in (False, True):
        with forced_dense_rows(dense), torch.autocast("cpu", torch.bfloat16):
            y = SparseRows.from_topk(values, indices, 7).matmul(weight)
            found.append((y, *torch.autograd.grad(y.square().sum(), [values, weight])))
    for sparse, written_out in zip(*found, strict=True):
        assert sparse.dtype is written_out.dtype is torch.float32
        torch.testing.assert_close(sparse, written_out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dense_and_sparse_give_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Small integers: sums are exact in every order, and in bfloat16.
    values = torch.randint(-2, 3, (5, 4)).to(dtype).requires_grad_()
    indices = torch.tensor([[0, 3, 3, 6], [1, 2, 5, 0], [6, 6, 6, 6], [0, 1, 2, 3], [5, 4, 2, 1]])
    weight = torch.randint(-2, 3, (7, 9)).to(dtype).requires_grad_()
    found = []
    for dense in (False, True):
        with forced_dense_rows(dense):
            y = SparseRows.from_topk(values, indices, 7) @ weight
            found.append((y.detach(), *torch.autograd.grad(y.sum(), (values, weight))))
    for sparse, densely in zip(*found, strict=True):
        assert torch.equal(sparse, densely)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_of_an_encoder_are_the_same_densely(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values, dy = (torch.randint(-2, 3, shape).to(dtype) for shape in ((20,), (5, 9)))
    rows = SparseRows.from_topk(values.view(5, 4), torch.randint(0, 7, (5, 4)), 7)
    operands = values, rows.crow_indices, rows.indices, dy, 7
    with forced_dense_rows(False):
        sparse = torch.ops.offpath.rows_encoder_gradients(*operands)
    with forced_dense_rows(True):
        densely = torch.ops.offpath.rows_encoder_gradients(*operands)
    assert all(map(torch.equal, sparse, densely)) and sparse[1].shape == (7,)


def test_an_index_out_of_range_is_refused_densely_as_well() -> None:
    rows = SparseRows.from_topk(torch.ones(2, 1), torch.tensor([[0], [3]]), 3)
    with forced_dense_rows(True), pytest.raises(KernelError, match=r"indices in \[0, 3\)"):
        rows.matmul(torch.ones(3, 2))
    with forced_dense_rows(True), pytest.raises(KernelError, match=r"indices in \[0, 3\)"):
        torch.ops.offpath.rows_dots(torch.ones(2, 2), rows.crow_indices, rows.indices, torch.ones(3, 2))


def test_rows_that_do_not_follow_one_another_are_refused_densely_as_well() -> None:
    indices, values, weight = torch.zeros(2, dtype=torch.int32), torch.ones(2), torch.ones(3, 2)
    for pointer in ([0, 1, 1], [0, 2, 3], [1, 1, 2], [0, 3, 2]):
        crow_indices = torch.tensor(pointer, dtype=torch.int32)
        rows, operands = SparseRows(crow_indices, indices, values, 3), (crow_indices, indices)
        products = (
            partial(rows.matmul, weight),
            partial(torch.ops.offpath.rows_dots, torch.ones(2, 2), *operands, weight),
            partial(torch.ops.offpath.rows_weight_gradient, values, *operands, torch.ones(2, 2), 3),
            rows.to_dense,
        )
        for product in products:
            with forced_dense_rows(True), pytest.raises(KernelError, match="crow_indices to rise from 0"):
                product()


def test_what_was_measured_decides_and_only_where_there_is_a_question(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[torch.dtype] = []

    def measure(_: kernels.Backend, dtype: torch.dtype) -> row_calibration.BreakEvens:
        measured.append(dtype)
        return {"matmul": [0.2, 0.1], "dots": [0.9, 0.9], "weight_gradient": [0.9, 0.9]}

    monkeypatch.setattr(row_calibration, "measure", measure)
    densely: list[bool] = []

    product = row_products._product

    def noted(*operands: torch.Tensor) -> torch.Tensor:
        densely.append(True)
        return product(*operands)

    monkeypatch.setattr(row_products, "_product", noted)
    weight, x = torch.randn(256, 1024), torch.randn(64, 256)
    topk_rows(x, 10).matmul(weight)
    assert not measured, "4 % live: no machine would compute that densely"
    topk_rows(x, 48).matmul(weight)
    assert len(measured) == 1 and not densely
    topk_rows(x, 64).matmul(weight)
    assert densely == [True] and len(measured) == 1


@pytest.mark.parametrize(
    ("entries", "density"), [(1, 0.4), (2**20, 0.4), (2**20 * 8**0.5, 0.2), (2**23, 0.1), (2**30, 0.1)]
)
def test_a_break_even_between_two_weights_is_between_theirs(
    entries: float, density: float, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_calibration, "measure", lambda *_: {key: [0.4, 0.1] for key in row_calibration.PRODUCTS})
    found = row_calibration.break_even(BACKEND, torch.float32, "dots", int(entries))
    assert found == pytest.approx(density, rel=1e-6)  # a weight has whole entries: less than 1 in 2^20 off


def _two_sparsities() -> tuple[SparseRows, SparseSparseLinear]:
    torch.manual_seed(0)
    return topk_rows(torch.rand(64, 512), 256), SparseSparseLinear(512, 512, sparsity=0.5)


@pytest.mark.parametrize(("visit", "densely"), [(1e-12, False), (1e-6, True)])
def test_many_rows_go_over_all_connections_where_these_cost_less(
    visit: float, densely: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not BACKEND.native:
        pytest.skip("the reference has no choice")
    seconds = dict.fromkeys((*visit_calibration.OVER_ALL_CONNECTIONS, "finding"), visit)
    monkeypatch.setattr(row_choice, "seconds_per_visit", lambda *_: seconds)
    used: list[str] = []
    for name in ("dx", "forward", "dvalues"):
        monkeypatch.setattr(Prepared, name, _noting(used, name, getattr(Prepared, name)))
    rows, layer = _two_sparsities()
    rows.values.requires_grad_()
    layer(rows).sum().backward()
    assert sorted(used) == (["dvalues", "dx", "forward"] if densely else [])
    layer(topk_rows(torch.rand(1, 512), 256))
    assert len(used) == (3 if densely else 0), "one row has all that it meets read once, and no more"
    used.clear()
    layer(rows.to_dense().detach())
    assert used == (["dx"] if densely else [])


def _noting(used: list[str], name: str, product: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        used.append(name)
        return product(*args, **kwargs)

    return noted


def test_an_index_out_of_range_is_refused_over_all_connections_as_well() -> None:
    layer = SparseSparseLinear(3, 2, density=1)
    weight = layer.connections.crow_indices, layer.connections.col_indices
    rows = SparseRows.from_topk(torch.ones(2, 1), torch.tensor([[0], [3]]), 3)
    parts, values = (rows.crow_indices, rows.indices), layer.values.detach()
    ops = torch.ops.offpath
    for product in (
        partial(ops.rows_sparse_matmul, rows.values, *parts, values, *weight, 2),
        partial(ops.rows_sparse_dots, torch.ones(2, 2), *parts, values, *weight),
        partial(ops.rows_sparse_weight_gradient, rows.values, *parts, torch.ones(2, 2), *weight),
    ):
        with forced_dense_rows(True), pytest.raises(KernelError, match=r"indices in \[0, 3\)"):
            product()


def test_what_a_visit_costs_is_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not BACKEND.native:
        pytest.skip("the reference has no choice")
    monkeypatch.setenv("OFFPATH_CACHE_DIR", str(tmp_path))
    measure_again = visit_calibration.seconds_per_visit.__wrapped__
    first = measure_again(BACKEND, torch.bfloat16)
    (file,) = tmp_path.glob("visits-*.json")
    assert json.loads(file.read_text())["found"] == first and measure_again(BACKEND, torch.bfloat16) == first
    file.write_text('{"found": {"finding": 1.0}, "undisturbed": true}')
    assert set(measure_again(BACKEND, torch.bfloat16)) == {*visit_calibration.OVER_ALL_CONNECTIONS, "finding"}


def test_break_evens_are_kept_in_the_cache_and_measured_anew_where_they_are_broken(cache: Path) -> None:
    if not BACKEND.native:
        pytest.skip("the reference has no break-even")
    first = row_calibration._break_evens(BACKEND, torch.float32)
    (file,) = cache.glob("rows-*.json")
    assert json.loads(file.read_text())["found"] == first and set(first) == set(row_calibration.PRODUCTS)
    row_calibration._break_evens.cache_clear()
    assert row_calibration._break_evens(BACKEND, torch.float32) == first
    file.write_text('{"found": {"matmul": [-1, 1]}, "undisturbed": true}')
    row_calibration._break_evens.cache_clear()
    again = row_calibration._break_evens(BACKEND, torch.float32)
    assert (
        all(density > 0 for densities in again.values() for density in densities)
        and json.loads(file.read_text())["found"] == again
    )
