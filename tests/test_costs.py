"""What a product is predicted to cost, from a table that is measured in part and in two halves."""

from __future__ import annotations

import math
from itertools import groupby, pairwise, product as combinations
from typing import Any

import pytest
import torch

from cost_tables import table_of
from offpath import kernels
from offpath.kernels import calibration
from offpath.kernels.costs import BATCHES, DENSITIES, GRID, LARGE_SIZES, SMALL_SIZES, CostTable, Sizes, sizes_for
from offpath.kernels.methods import METHODS, PRODUCTS


def test_prediction_meets_the_measurement_on_the_grid_and_is_a_power_law_between() -> None:
    table = table_of(lambda p, m, size, density, batch: 1e-9 * size**2 * density * batch)
    for size, density, batch in combinations((128, 300, 1024, 4096), (0.02, 0.07, 1.0), (1, 10, 256, 5000)):
        nnz = math.ceil(size * size * density)
        seconds = table.predict("forward", "dense", size, size, nnz, batch)
        assert math.isclose(seconds, 1e-9 * nnz * batch, rel_tol=1e-9)


def test_what_a_call_costs_besides_its_work_does_not_grow_with_many_tokens_or_beyond_the_grid() -> None:
    table = table_of(lambda p, m, size, density, batch: 1e-3 + 1e-9 * size**2)
    assert table.predict("forward", "row-wise", 4096, 4096, 4096**2, 1) == pytest.approx(1e-3 + 1e-9 * 4096**2)
    table = table_of(lambda p, m, size, density, batch: 1e-3 + 1e-5 * batch)
    for batch in (1000, 5000):
        assert table.predict("forward", "dense", 512, 512, 512, batch) == pytest.approx(1e-3 + 1e-5 * batch)


@pytest.mark.parametrize(("rows", "columns", "nnz", "batch"), [(0, 5, 0, 3), (5, 0, 0, 3), (5, 5, 0, 0), (1, 1, 1, 1)])
def test_prediction_of_what_lies_below_the_grid_is_its_edge(rows: int, columns: int, nnz: int, batch: int) -> None:
    table = table_of(lambda p, m, size, density, batch: 1e-6 * size)
    assert table.predict("dx", "bucketed", rows, columns, nnz, batch) == pytest.approx(1e-6 * SMALL_SIZES[0])


def test_large_matrices_have_a_table_of_their_own() -> None:
    assert sizes_for(1024, 1024) == sizes_for(1, 1) == SMALL_SIZES
    assert sizes_for(1024, 1025) == sizes_for(10**5, 10**5) == LARGE_SIZES


@pytest.mark.parametrize("sizes", [SMALL_SIZES, LARGE_SIZES], ids=["small", "large"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_points_that_are_not_measured_follow_those_that_are(product: str, sizes: Sizes) -> None:
    """For times that grow as the scaling supposes, nothing is lost by not measuring."""

    def seconds_of(p: str, m: str, size: int, density: float, batch: int) -> float:
        return 1e-9 * size**2 * batch * (1 if m in calibration.AT_ANY_DENSITY else density)

    true = table_of(seconds_of, sizes).seconds[product]
    measured = {
        method: [
            s if calibration._is_measured(sizes, product, method, *point) else math.inf
            for point, s in zip(GRID, column, strict=True)
        ]
        for method, column in true.items()
    }
    for column in measured.values():
        for i, (size, density, _) in enumerate(GRID):
            if sizes == LARGE_SIZES and size > 0 and density > calibration.LAST_LARGE_DENSITY:
                column[i] = math.inf
    of_plan = dict(zip(GRID, measured["tiled" if product == "dvalues" else "bucketed"], strict=True))
    too_large = 2 * 2 * (len(BATCHES) - 1) if sizes == LARGE_SIZES else 0  # two densities of two sizes
    assert sum(math.isinf(s) for (*_, batch), s in of_plan.items() if batch < calibration.MANY) == too_large
    assert all(math.isinf(s) for (*_, batch), s in of_plan.items() if batch == calibration.MANY)
    of_dense = dict(zip(GRID, measured["dense"], strict=True))
    many = [size for size in range(3) if not math.isinf(of_dense[size, calibration.DENSE_DENSITY, calibration.MANY])]
    assert many == ([0, 1] if sizes == SMALL_SIZES else [])
    assert all(map(math.isinf, measured["dense"][: calibration.SPEED_DENSITY * len(BATCHES)]))
    calibration._fill_in(product, measured)
    for method, column in true.items():
        assert measured[method] == pytest.approx(column)


@pytest.mark.parametrize("disturbed", [(0, calibration.DENSE_DENSITY), (1, calibration.SPEED_DENSITY)])
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_disturbed_time_where_a_growth_begins_does_not_make_a_method_look_cheap(
    product: str, disturbed: tuple[int, int]
) -> None:
    columns: dict[str, list[float]] = {method: [math.inf] * len(GRID) for method in METHODS[product]}
    for method, column in columns.items():
        for i, (size, density, batch) in enumerate(GRID):
            too_large = size > 0 and density > calibration.LAST_LARGE_DENSITY
            if not too_large and calibration._is_measured(LARGE_SIZES, product, method, size, density, batch):
                longer = 2.5 if (size, density) == disturbed else 1.0
                column[i] = 1e-6 * 4**size * (1 + DENSITIES[density]) * (10 + BATCHES[batch]) * longer
    calibration._fill_in(product, columns)
    for method, column in columns.items():
        at = dict(zip(GRID, column, strict=True))
        for size, density, batch in GRID:
            if size > 0 and density > calibration.LAST_LARGE_DENSITY:
                assert at[size, density, batch] >= at[size, density - 1, batch], (method, size, density, batch)


def test_filled_takes_a_large_matrix_with_few_values_as_long_as_the_sparser_one_that_is_measured() -> None:
    seconds = [math.inf] * len(GRID)
    for i, (size, density, batch) in enumerate(GRID):
        if calibration._is_measured(LARGE_SIZES, "forward", "filled", size, density, batch):
            seconds[i] = DENSITIES[density] * BATCHES[batch]
    methods = {"filled": seconds}
    calibration._fill_in("forward", methods)
    sparser, denser = DENSITIES[calibration.SPEED_DENSITY], DENSITIES[calibration.DENSE_DENSITY]
    assert methods["filled"] == pytest.approx(
        [(sparser if DENSITIES[density] <= sparser else denser) * BATCHES[batch] for _, density, batch in GRID]
    )


@pytest.mark.parametrize("half", calibration.HALVES)
def test_a_method_goes_through_all_large_matrices_in_turns(half: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls in a row with one matrix would find it in cache, as no large layer of a network does."""
    order: list[calibration.Key] = []
    earlier: dict[calibration.Key, Any] = {}

    def keep_order(
        calls: dict[calibration.Key, object], rounds: int, before: dict[calibration.Key, Any]
    ) -> dict[calibration.Key, float]:
        order.extend(calls)
        earlier.update(before)
        return dict.fromkeys(calls, 1.0)

    points = [i for i, (_, density, _) in enumerate(GRID) if density in half]
    monkeypatch.setattr(calibration, "fastest", keep_order)
    monkeypatch.setattr(calibration, "_problems", lambda sizes, densities, dtype: ((i, (0, 0), i) for i in points))
    calibration._measure_densities(kernels.select("cpu", torch.float32), torch.float32, LARGE_SIZES, half)
    turns = [turn for turn, _ in groupby(order, key=lambda call: (*call[:2], BATCHES[GRID[call[2]][2]]))]
    assert len(turns) == len(set(turns)), "a method came to some of its matrices later than to the others"
    assert order.count(order[0]) == 1 and {call[2] for call in order} <= set(points)
    # Nor does what comes after a large one find its caches full of that one: a small one has had them since.
    firsts = [call for last, call in pairwise([None, *order]) if last is None or GRID[call[2]][0] < GRID[last[2]][0]]
    assert list(earlier) == firsts
    for (*_, i), call in earlier.items():
        of_call = call.args[-1]  # its x, which stands for its place in GRID
        assert GRID[of_call][0] == 0 and of_call != i, "a large one, or the same matrix"


@pytest.mark.parametrize("slower", [1.4, 1.05, 1 / 1.05, 1 / 1.4])
def test_halves_that_were_measured_at_two_speeds_are_compared_at_the_faster(slower: float) -> None:
    """A method is told from the speed by those that take as long in either half; a few outliers change nothing."""
    halves = [
        {
            (p, m, i): 1e-9
            * 1024 ** (1 + size)
            * BATCHES[batch]
            * (1 if m in calibration.AT_ANY_DENSITY else density + 1)
            for i, (size, density, batch) in enumerate(GRID)
            for p in PRODUCTS
            for m in METHODS[p]
            if density in half and calibration._is_measured(LARGE_SIZES, p, m, size, density, batch)
        }
        for half in calibration.HALVES
    ]
    first = {key: seconds * slower for key, seconds in halves[0].items()}
    outlier = next(key for key in first if key[1] == "dense")
    first[outlier] *= 50
    got = calibration.at_one_speed(first, halves[1])
    if 1 / calibration.LEAST_DRIFT < slower < calibration.LEAST_DRIFT:
        assert got == (first, halves[1]), "methods differ by so much in themselves"
        return
    faster = min(slower, 1.0)
    for times, true in zip(got, halves, strict=True):
        assert all(math.isclose(times[key], true[key] * faster) for key in true if key != outlier)


def test_time_grows_by_what_is_multiplied_at_once() -> None:
    table = table_of(lambda p, m, size, density, batch: 1e-6 * batch)

    def tokens(product: str, method: str, batch: int) -> float:
        return round(table.predict(product, method, 512, 512, 1000, batch) * 1e6, 6)

    for product, method in (("forward", "bucketed"), ("dx", "row-wise"), ("dvalues", "tiled")):
        assert [tokens(product, method, b) for b in (9, 16, 17, 24, 32, 250, 257)] == [9, 16, 32, 32, 32, 256, 272]
    for product in ("forward", "dx"):
        assert [tokens(product, "filled", b) for b in (9, 16, 17, 24, 25, 250, 257)] == [9, 16, 24, 24, 32, 256, 264]
    for product, method in (("forward", "bitmap"), ("forward", "dense"), ("dvalues", "filled")):
        assert [tokens(product, method, b) for b in (17, 250, 257)] == [17, 250, 257]


def test_a_disturbed_measurement_is_seen_by_a_larger_problem_that_took_less() -> None:
    true = table_of(lambda p, m, size, density, batch: 1e-9 * size**2 * density * batch)
    disturbed = {p: {m: list(column) for m, column in methods.items()} for p, methods in true.seconds.items()}
    for i in range(0, len(GRID) - 1, 2):  # no two neighbours, and not the largest of all
        disturbed["forward"]["bucketed"][i] += 8e-3
    healed = CostTable.from_measurement(SMALL_SIZES, disturbed)
    assert CostTable.from_measurement(SMALL_SIZES, true.seconds) == true
    for got, right in zip(healed.seconds["forward"]["bucketed"], true.seconds["forward"]["bucketed"], strict=True):
        assert right <= got <= 5 * right, "what is left is one step of the grid, at most"
