"""Break-evens of curves that are known, and wrong products, which must get no speed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from mutants import MUTANTS
from offpath import kernels, pattern as patterns
from offpath.cost.bounds import Expected, excess, expected
from offpath.cost.crossover import DENSE, OFFPATH, PRODUCTS, TORCH_SPARSE, Contender, break_even, measure
from offpath.kernels import Backend
from offpath.ops import forced_methods
from offpath.studies.crossover import contenders
from offpath.studies.crossover.contenders import Layers, Workload
from test_timing import Clock

SPARSITIES = st.floats(0, 0.999)
CURVES = st.lists(
    st.tuples(SPARSITIES, st.floats(0.01, 100)), min_size=1, max_size=10, unique_by=lambda point: point[0]
)


# The break-even


@given(CURVES)
def test_break_even_lies_between_the_last_slower_point_and_the_next(points: list[tuple[float, float]]) -> None:
    found, ordered = break_even(points), sorted(points)
    slower = [sparsity for sparsity, speedup in ordered if speedup < 1]
    assert (found.measured_from, found.measured_to) == (ordered[0][0], ordered[-1][0])
    if not slower:
        assert (found.found, found.sparsity) == ("lowest", ordered[0][0])
    elif slower[-1] == ordered[-1][0]:
        assert (found.found, found.sparsity) == ("never", None)
    else:
        later = [sparsity for sparsity, _ in ordered if sparsity > slower[-1]]
        assert found.found == "between" and found.sparsity is not None
        assert slower[-1] <= found.sparsity <= later[0]


@given(CURVES, st.randoms())
def test_order_of_the_points_does_not_matter(points: list[tuple[float, float]], random: Any) -> None:
    shuffled = list(points)
    random.shuffle(shuffled)
    assert break_even(shuffled) == break_even(points)


@given(st.floats(0.05, 0.95), st.floats(0.2, 3))
def test_power_law_breaks_even_where_it_does(where: float, exponent: float) -> None:
    """time = ((1 - s) / (1 - where))^exponent: straight in log time over log density, so found to rounding."""
    points = [(s, ((1 - where) / (1 - s)) ** exponent) for s in (0.0, 0.3, 0.6, 0.99)]
    found = break_even(points)
    assert found.found == "between" and found.sparsity is not None
    # Each log and exp errs by an ulp of numbers below 5; they are divided by exponent * (a log ratio of 0.36 or more).
    assert abs(found.sparsity - where) <= 100 * 2**-52 * 5 / (0.36 * exponent)


def test_later_dip_counts() -> None:
    assert break_even([(0.1, 2.0), (0.5, 0.5), (0.9, 2.0)]).sparsity == pytest.approx(1 - math.sqrt(0.5 * 0.1))


def test_edges_of_the_break_even_say_what_is_known() -> None:
    assert str(break_even([(0.1, 1.0)])) == "≤ 10%"
    assert str(break_even([(0.1, 3.0), (0.985, 0.99)])) == "> 98.5%"
    with pytest.raises(ValueError, match="expected at least one"):
        break_even([])


# Checked before it is timed


def test_bound_takes_right_sums_and_refuses_wrong_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, 300, generator=generator, dtype=torch.float64) for _ in range(2))
    for dtype in (torch.float32, torch.bfloat16):
        x, w = a.to(dtype), b.to(dtype)
        size = x.float().abs() @ w.float().abs().t()
        right = expected(x.double() @ w.double().t(), size, torch.tensor(300), dtype)
        y = (x.float() @ w.float().t()).to(dtype)
        assert excess(y, right) is None
        largest = right.bound.argmax()
        for change in (2.1, -2.1, math.nan, math.inf):
            wrong = right.exact.clone()
            wrong.view(-1)[largest] += change * right.bound.view(-1)[largest]
            assert not (excess(wrong, right) or 0) <= 2
        assert excess(y[1:], right) == math.inf
    in_low_precision = (a.bfloat16() * b.bfloat16()).cumsum(1, dtype=torch.bfloat16)[:, -1]
    right = expected(
        (a.bfloat16().double() * b.bfloat16().double()).sum(1),
        (a.bfloat16().float() * b.bfloat16().float()).abs().sum(1),
        torch.tensor(300),
        torch.bfloat16,
    )
    assert excess(in_low_precision, right) is not None, "a sum in bfloat16 must not pass for one in float32"


def _contender(clock: Clock, name: str, result: float, seconds: float = 1.0, **more: Any) -> Contender:
    call = clock.lasting(name, seconds)

    def run() -> tuple[torch.Tensor]:
        call()
        return (torch.tensor([result]),)

    return Contender(name, "", run, [Expected(torch.tensor([1.0]).double(), torch.tensor([0.5]).double())], **more)


def test_wrong_contender_is_called_once_and_gets_no_time() -> None:
    clock = Clock()
    right, wrong, nan = measure(
        [_contender(clock, "a", 1.5), _contender(clock, "b", 2.0), _contender(clock, "c", math.nan)], 0.0, clock=clock
    )
    assert right.status == "measured" and right.timing is not None
    assert wrong.status == nan.status == "wrong" and wrong.timing is nan.timing is None
    assert wrong.reason == "off by 2 times the error bound"
    assert clock.called.count("b") == clock.called.count("c") == 1


def test_refusal_is_told_and_any_other_error_is_raised() -> None:
    def refuse() -> tuple[torch.Tensor]:
        raise kernels.KernelError("not today")

    (refused,) = measure([Contender("a", "", refuse, [], (kernels.KernelError,))], 0.0)
    assert (refused.status, refused.reason, refused.timing) == ("not computed", "not today", None)
    with pytest.raises(kernels.KernelError):
        measure([Contender("a", "", refuse, [])], 0.0)


def test_slow_reference_is_called_once() -> None:
    clock = Clock()
    slow, other = measure(
        [
            _contender(clock, "slow", 1.0, seconds=9.0, only_for_reference=True),
            _contender(clock, "other", 1.0, seconds=9.0),
        ],
        5.0,
        clock=clock,
    )
    assert clock.called.count("slow") == 1 and slow.timing is not None
    assert (slow.timing.median_seconds, slow.timing.rounds) == (9.0, 1)
    assert other.timing is not None and other.timing.rounds > 1


def _workload(batch: int, dtype: torch.dtype = torch.float32) -> Workload:
    generator = torch.Generator().manual_seed(3)
    pattern = patterns.from_mask(torch.rand(19, 31, generator=generator) >= 0.6)
    return Workload(Layers(pattern, dtype, generator), batch, generator)


@pytest.mark.parametrize("batch", [1, 5, 70])
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_way_is_right(product: str, batch: int) -> None:
    outcomes = measure(_workload(batch).contenders(product), 1e-4)
    assert {o.method for o in outcomes} >= {DENSE, OFFPATH}
    assert [(o.way, o.reason) for o in outcomes if o.status != "measured"] == []
    assert all(o.timing and o.timing.rounds >= 3 for o in outcomes if o.method != TORCH_SPARSE)


@pytest.mark.parametrize("product", PRODUCTS)
def test_large_layer_is_checked_in_part_and_at_both_ends(product: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "CHECKED_FEATURES", 13)
    monkeypatch.setattr(contenders, "CHECKED_AT_EACH_END", 2)
    workload = _workload(9)
    rows, columns = workload.layers.rows.tolist(), workload.layers.columns.tolist()
    assert rows == sorted(set(rows)) and columns == sorted(set(columns)) and len(rows) == len(columns) == 13
    assert {0, 1, 17, 18} <= set(rows) and {0, 1, 29, 30} <= set(columns)
    for contender in workload.contenders(product):
        results = contender.run()
        assert [excess(result, right) for result, right in zip(results, contender.expected, strict=True)].count(
            None
        ) == len(results)
        for result, right in zip(results, contender.expected, strict=True):
            flat = result.clone()
            flat[right.index] = math.nan
            assert right.index == () or 0 < int(flat.isnan().sum()) < flat.numel()
            assert excess(flat, right) == math.inf
            assert excess(result[:-1], right) == math.inf


def _summing_in_bfloat16() -> Backend:
    """A kernel that rounds each partial sum, as the definition does not."""

    def rows(crow_indices: torch.Tensor) -> torch.Tensor:
        return torch.arange(crow_indices.numel() - 1).repeat_interleave(crow_indices.diff())

    def spmm(crow_indices: torch.Tensor, col_indices: torch.Tensor, values: torch.Tensor, x: torch.Tensor, bias=None):
        y = x.new_zeros(x.shape[0], crow_indices.numel() - 1)
        for slot, row in enumerate(rows(crow_indices).tolist()):
            y[:, row] += values[slot] * x[:, col_indices[slot]]
        return y if bias is None else y + bias

    def sddmm(crow_indices: torch.Tensor, col_indices: torch.Tensor, dy: torch.Tensor, x: torch.Tensor):
        dvalues = torch.zeros(col_indices.numel(), dtype=dy.dtype)
        for token in range(len(x)):
            dvalues += dy[token, rows(crow_indices)] * x[token, col_indices]
        return dvalues

    return replace(kernels.backends()["reference"], name="bfloat16 sums", spmm=spmm, sddmm=sddmm)


@pytest.mark.parametrize("product", PRODUCTS)
def test_bfloat16_summed_in_float32_is_right_and_summed_in_bfloat16_is_wrong(product: str) -> None:
    workload = _workload(70, torch.bfloat16)
    for backend, status in ((kernels.backends()["reference"], "measured"), (_summing_in_bfloat16(), "wrong")):
        with kernels.forced(backend):
            outcomes = measure(workload.contenders(product), 1e-4)
        found = {o.method: o.status for o in outcomes if o.method != TORCH_SPARSE}
        assert found == {DENSE: "measured", OFFPATH: status}


# Which products a wrong kernel makes wrong.
SEEN_IN = {
    "drops the last connection": ("forward", "dx", "step"),
    "off by one row": ("forward", "dx", "step"),
    "wrong column": ("forward", "dx", "step"),
    "forgets the bias": ("forward", "step"),
    "sums in bfloat16": ("forward", "dx", "step"),
    "plan ignores the permutation": ("dx", "step"),
    "plan skips the last group": ("forward", "dx", "step"),
    "plan pads with the first sample": ("forward", "dx", "step"),
    "shifts the gradient": ("dweight", "step"),
    "swaps the gradient's operands": ("dweight", "step"),
    "gradient drops the last sample": ("dweight", "step"),
}


def wrong_backend(name: str) -> Backend:
    (backend,) = (m.backend for m in MUTANTS if m.backend.name == f"mutant: {name}")
    return backend


@pytest.mark.parametrize("name", SEEN_IN)
def test_wrong_kernel_gets_no_speed(name: str) -> None:
    workload = _workload(17)
    method = "bucketed" if name.startswith("plan") else "row-wise"
    with kernels.forced(wrong_backend(name)), forced_methods(forward=method, dx=method):
        outcomes = {product: measure(workload.contenders(product), 1e-4) for product in PRODUCTS}
    wrong = {product for product, found in outcomes.items() for o in found if o.status == "wrong"}
    assert wrong == set(SEEN_IN[name])
    assert all(o.timing is None for found in outcomes.values() for o in found if o.status == "wrong")
