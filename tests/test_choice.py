"""Which method computes a product: what is kept of a measurement, what is chosen, and that every choice is right."""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkers import gamma
from cost_tables import table_of
from offpath import SparseLinear, kernels
from offpath.kernels import Backend, KernelError, calibration
from offpath.kernels.costs import GRID, LARGE_SIZES, SMALL_SIZES, CostTable
from offpath.kernels.methods import METHODS, PRODUCTS, PreparedMatrix, PreparedWeight
from offpath.nn import Int8SparseLinear
from offpath.ops import choice, forced_methods, sparse_linear
from offpath.ops.choice import filled_margin

BEST = kernels.default_backend()[0]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OFFPATH_CACHE_DIR", str(tmp_path / "cache"))
    calibration.cost_table.cache_clear()
    yield tmp_path / "cache"
    calibration.cost_table.cache_clear()


def _forget(own_cache: Path) -> None:
    calibration.cost_table.cache_clear()
    for table in own_cache.glob("costs-*.json"):
        table.unlink()


@pytest.fixture
def quick_measure(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Instead of the measurement, a table by formula; the list says for which dtypes it was asked."""
    asked: list[torch.dtype] = []

    def measure(backend: Backend, dtype: torch.dtype, sizes: tuple[int, int]) -> CostTable:
        asked.append(dtype)
        return table_of(
            lambda p, m, size, density, batch: 1e-9 * size * size * batch * (1 if m == "dense" else 4 * density), sizes
        )

    monkeypatch.setattr(calibration, "measure", measure)
    return asked


def test_values_go_over_a_second_plan_where_dx_goes_over_one(own_cache, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"bucketed": 1.0, "tiled": 1.5, "row-wise": 9.0, "bitmap": 1.0, "filled": 9.0, "dense": 9.0}
    of_dx = {"bucketed": 1.0, "bitmap": 2.0}
    monkeypatch.setattr(
        calibration, "measure", lambda *_: table_of(lambda p, m, *_: (costs | of_dx if p == "dx" else costs)[m])
    )
    backward, seen = PreparedWeight.backward, []

    def watched(self, backend, dx_method, dvalues_method, *operands):
        seen.append((dx_method, dvalues_method))
        return backward(self, backend, dx_method, dvalues_method, *operands)

    monkeypatch.setattr(PreparedWeight, "backward", watched)
    x = torch.randn(16, 64, requires_grad=True)
    for changed, expected in (({}, ("bucketed", "tiled")), ({"tiled": 1.7}, ("bucketed", "bitmap"))):
        costs.update(changed)
        _forget(own_cache)
        with kernels.forced(BEST):
            layer = SparseLinear(64, 64)
            layer(x).sum().backward()
            chosen = layer.explain(16).chosen
        assert seen.pop() == (chosen["dx"], chosen["dvalues"]) == expected
    of_dx.update({"bucketed": 3.0})
    costs.update({"tiled": 1.5})
    _forget(own_cache)
    with kernels.forced(BEST):
        assert SparseLinear(64, 64).explain(16).chosen == {"forward": "bucketed", "dx": "bitmap", "dvalues": "bitmap"}


def test_near_ties_go_to_plans_then_to_what_sparsity_does_not_change_then_to_filled(
    own_cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {"bucketed": 1.1, "tiled": 1.2, "row-wise": 1.0, "bitmap": 9.0, "filled": 9.0, "dense": 9.0}
    monkeypatch.setattr(calibration, "measure", lambda *_: table_of(lambda p, m, *point: costs[m]))
    with kernels.forced(BEST):
        chosen = SparseLinear(64, 64).explain(64).chosen
        assert chosen == {"forward": "bucketed", "dx": "bucketed", "dvalues": "row-wise"}
        almost = min(1.04 * filled_margin(kernels.select("cpu", torch.float32)) - 0.01, 1.04)
        for changed, expected in (
            ({"dense": 1.04}, "dense"),
            ({"filled": almost}, "filled"),
            ({"dense": 1.04 * 0.9}, "dense"),
        ):
            costs.update(changed)
            _forget(own_cache)
            assert set(SparseLinear(64, 64).explain(64).chosen.values()) == {expected}


def test_two_near_ties_do_not_add_up(own_cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled, which is nearly as cheap as dense, which is nearly as cheap as a plan, is not chosen before the plan."""
    monkeypatch.setattr(choice, "filled_margin", lambda backend: 1.1)
    costs = {"bucketed": 1.0, "tiled": 1.0, "row-wise": 9.0, "bitmap": 9.0, "filled": 1.13, "dense": 1.04}
    monkeypatch.setattr(calibration, "measure", lambda *_: table_of(lambda p, m, *point: costs[m]))
    with kernels.forced(BEST):
        chosen = SparseLinear(64, 64).explain(64).chosen
    assert chosen == {"forward": "bucketed", "dx": "bucketed", "dvalues": "tiled"}


def test_bits_must_gain_more_than_plans_over_what_sparsity_does_not_change(own_cache, monkeypatch) -> None:
    costs = dict.fromkeys(("bucketed", "tiled", "row-wise", "bitmap", "filled"), 9.0) | {"dense": 1.0}
    monkeypatch.setattr(calibration, "measure", lambda *_: table_of(lambda p, m, *point: costs[m]))
    with kernels.forced(BEST):
        for changed, batch, expected, of_values in (
            ({"bitmap": 1 / 1.11}, 64, "dense", "bitmap"),  # dvalues over bits is measured with as many tokens
            ({"bitmap": 1 / 1.11}, 65, "dense", "dense"),
            ({"bitmap": 1 / 1.13}, 65, "bitmap", "bitmap"),
            ({"bitmap": 1 / 1.06}, 17, "dense", "bitmap"),
            ({"bitmap": 1 / 1.06}, 16, "bitmap", "bitmap"),
            ({"bitmap": 1 / 1.04}, 16, "dense", "dense"),
            ({"bitmap": 9.0, "bucketed": 1 / 1.06, "tiled": 1 / 1.06}, 64, "bucketed", "tiled"),
        ):
            costs.update(changed)
            _forget(own_cache)
            chosen = SparseLinear(64, 64).explain(batch).chosen
            assert chosen == {"forward": expected, "dx": expected, "dvalues": of_values}


def test_near_ties_go_to_what_computes_both_gradients_in_one_call(own_cache, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = {"bucketed": 9e-5, "tiled": 4e-5, "row-wise": 9e-5, "bitmap": 4.9e-5, "filled": 9e-5, "dense": 9e-5}
    monkeypatch.setattr(calibration, "measure", lambda *_: table_of(lambda p, m, *point: costs[m]))
    for bitmap, expected in ((4.9e-5, "bitmap"), (5.1e-5, "tiled")):
        costs["bitmap"] = bitmap
        _forget(own_cache)
        with kernels.forced(BEST):
            chosen = SparseLinear(64, 64).explain(4).chosen
        assert chosen == {"forward": "bitmap", "dx": "bitmap", "dvalues": expected}


def test_int8_values_are_copied_only_where_that_pays(own_cache, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = dict.fromkeys(("bucketed", "tiled", "filled", "dense"), 9e-4) | {"row-wise": 1e-5}
    monkeypatch.setattr(calibration, "measure", lambda *_: table_of(lambda p, m, *point: costs[m]))
    int8_spmm, seen = PreparedMatrix.int8_spmm, []

    def watched(self, backend, method, *operands):
        seen.append(method)
        return int8_spmm(self, backend, method, *operands)

    monkeypatch.setattr(PreparedMatrix, "int8_spmm", watched)
    for bitmap in (1.5e-5, 3e-5):
        costs["bitmap"] = bitmap
        _forget(own_cache)
        with kernels.forced(BEST):
            layer = SparseLinear(64, 64)
            Int8SparseLinear.from_sparse(layer)(torch.randn(4, 64))
            assert layer.explain(4).chosen["forward"] == "row-wise"
    assert seen == ["bitmap", "row-wise"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_int8_values_must_gain_more_than_those_of_others(own_cache, monkeypatch, dtype: torch.dtype) -> None:
    """They are widened anew for every few tokens, and lose products of pairs."""
    costs = {"bucketed": 9.0, "row-wise": 9.0, "bitmap": 1.0, "filled": 1.3, "dense": 9.0}
    monkeypatch.setattr(calibration, "measure", lambda *_: table_of(lambda p, m, *_: costs.get(m, 9.0)))

    def chosen(int8: bool) -> str:
        return choice.choose(BEST, "forward", 512, 512, 9999, 16, dtype, "speed", int8=int8)

    assert chosen(int8=False) == "bitmap"
    # 1.4 of bits against 1.3 filled, and 1.2 times that in bfloat16, where bits stay the cheaper.
    assert chosen(int8=True) == ("filled" if dtype is torch.float32 else "bitmap")
    costs["filled"] = 1.1
    _forget(own_cache)
    assert chosen(int8=True) == "filled"


def test_the_cheapest_is_chosen_and_memory_never_writes_out_the_weight(own_cache, quick_measure) -> None:
    with kernels.forced(BEST):
        for sparsity, expected in ((0.5, "dense"), (0.9, "sparse")):
            explanation = SparseLinear(256, 256, sparsity=sparsity).explain(64)
            assert all((method == "dense") == (expected == "dense") for method in explanation.chosen.values())
            assert str(explanation).count("*") == len(PRODUCTS)
        thrifty = SparseLinear(256, 256, sparsity=0.5, prefer="memory").explain(64)
        assert "dense" not in thrifty.chosen.values() and {o.method for o in thrifty.options} & {"dense"} == set()
    with pytest.raises(ValueError, match="'speed' or 'memory', got 'fast'"):
        SparseLinear(4, 4, prefer="fast")


def test_memory_is_held_in_the_backward_pass_too(own_cache, quick_measure, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_):
        raise AssertionError("the weight was written out")

    with kernels.forced(replace(BEST, expand=refuse, compress=refuse)):
        layer = SparseLinear(64, 64, sparsity=0.1, prefer="memory")
        layer(torch.randn(32, 64, requires_grad=True)).sum().backward()


def test_a_step_writes_the_weight_out_once() -> None:
    """And the gradient of x is the same as that of a step whose forward product was computed in another way."""
    written = []

    def expand(*args):
        written.append(args)
        return BEST.expand(*args)

    layer = SparseLinear(64, 64, sparsity=0.1, generator=torch.Generator().manual_seed(0))
    x, dy = torch.randn(32, 64, requires_grad=True), torch.randn(32, 64)

    def gradient_of_x(forward: str) -> torch.Tensor:
        written.clear()
        with kernels.forced(replace(BEST, expand=expand)), forced_methods(forward=forward, dx="dense", dvalues="dense"):
            layer(x).backward(dy)
        gradient, x.grad = x.grad, None
        return gradient

    kept = gradient_of_x("dense")
    assert len(written) == 1
    assert torch.equal(gradient_of_x("bucketed"), kept) and len(written) == 1
    layer.values.requires_grad_(False)
    assert torch.equal(gradient_of_x("dense"), kept) and len(written) == 2, "kept only for whole steps"


def test_a_table_is_measured_once_and_found_by_the_next_process(own_cache, quick_measure) -> None:
    first = calibration.cost_table(BEST, torch.float32, SMALL_SIZES)
    assert calibration.cost_table(BEST, torch.float64, SMALL_SIZES) is not None
    calibration.cost_table.cache_clear()
    assert calibration.cost_table(BEST, torch.float32, SMALL_SIZES) == first
    assert quick_measure == [torch.float32], "float64 follows float32, and the second look finds the file"
    calibration.cost_table(BEST, torch.bfloat16, SMALL_SIZES)
    assert quick_measure == [torch.float32, torch.bfloat16]
    calibration.cost_table(BEST, torch.bfloat16, LARGE_SIZES)
    assert len(list(own_cache.glob("costs-*.json"))) == 3 and not list(own_cache.glob(".*"))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"forward": {}}', '{"found": {"forward": {"dense": [1.0]}}, "undisturbed": true}']
)
def test_a_broken_table_is_measured_again(own_cache, quick_measure, content: str) -> None:
    good = calibration.cost_table(BEST, torch.float32, SMALL_SIZES)
    (path,) = own_cache.glob("costs-*.json")
    path.write_text(content)
    calibration.cost_table.cache_clear()
    assert calibration.cost_table(BEST, torch.float32, SMALL_SIZES) == good and len(quick_measure) == 2
    assert json.loads(path.read_text())["found"] == good.seconds


def test_a_cache_that_cannot_be_written_costs_a_warning(quick_measure, monkeypatch, caplog, tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # nobody, not even root, makes a folder below a file
    monkeypatch.setenv("OFFPATH_CACHE_DIR", str(tmp_path / "file" / "cache"))
    calibration.cost_table.cache_clear()
    assert calibration.cost_table(BEST, torch.float32, SMALL_SIZES).seconds
    calibration.cost_table.cache_clear()
    assert "measures its kernels in every process" in caplog.text


def test_a_user_without_a_home_is_told_so(quick_measure, monkeypatch, caplog) -> None:
    for name in ("OFFPATH_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    calibration.cost_table.cache_clear()
    assert calibration.cost_table(BEST, torch.float32, SMALL_SIZES).seconds
    calibration.cost_table.cache_clear()
    assert "no home directory for this user; set OFFPATH_CACHE_DIR" in caplog.text


def _measure_in_a_process(folder: str) -> dict:
    os.environ["OFFPATH_CACHE_DIR"] = folder
    calibration.SMALL_ROUNDS = 1
    return calibration.cost_table(BEST, torch.float32, SMALL_SIZES).seconds


def test_two_processes_at_once_share_one_measurement(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_measure_in_a_process, [str(tmp_path)] * 2)
    assert first == second
    assert all(len(seconds) == len(GRID) for methods in first.values() for seconds in methods.values())


@pytest.mark.parametrize("batch", [1, 9, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS["forward"])
def test_every_method_of_every_backend_gives_the_same_layer(
    backend: Backend, method: str, dtype: torch.dtype, batch: int
) -> None:
    """A method is a way, not a result: outputs and gradients are within the bounds of the definition."""
    layer = SparseLinear(70, 50, sparsity=0.6, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = torch.randn(batch, 70, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    dy = torch.randn(batch, 50, generator=torch.Generator().manual_seed(2)).to(dtype)
    with forced_methods(forward=method, dx=method, dvalues="tiled" if method == "bucketed" else method):
        y = layer(x)
        dx, dvalues = torch.autograd.grad(y, (x, layer.values), dy)
    weight, rows = layer.pattern.to_dense(layer.values.detach().double()), layer.pattern.row_indices().long()
    wide, sent = x.detach().double(), dy.double()

    def check(result: torch.Tensor, exact: torch.Tensor, size: torch.Tensor, terms: int) -> None:
        summed_in = torch.float32 if dtype is torch.bfloat16 else dtype
        bound = gamma(torch.tensor(terms), summed_in) * size
        if summed_in is not dtype:
            bound += torch.finfo(dtype).eps / 2 * (exact.abs() + bound)
        assert bool(((result.double() - exact).abs() <= bound).all())

    # A dense product sums over the zeros as well: their number is what bounds it.
    bias = layer.bias.detach().double()
    check(y.detach(), wide @ weight.t() + bias, wide.abs() @ weight.t().abs() + bias.abs(), 71)
    check(dx, sent @ weight, sent.abs() @ weight.abs(), 50)
    columns = layer.col_indices.long()
    exact, size = (sent.t() @ wide)[rows, columns], (sent.t().abs() @ wide.abs())[rows, columns]
    check(dvalues, exact, size, batch)


@pytest.mark.parametrize("method", METHODS["forward"])
def test_an_autocast_changes_no_op(method: str) -> None:
    """Layers cast their operands in an autocast; an op computes in the dtype of those that it is given, by any way."""
    layer, x = SparseLinear(70, 50, sparsity=0.6), torch.randn(5, 70, requires_grad=True)
    indices = layer.crow_indices, layer.col_indices
    results = []
    for enabled in (False, True):
        with (
            forced_methods(forward=method, dx=method, dvalues="tiled" if method == "bucketed" else method),
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
        ):
            with torch.no_grad():
                inferred = sparse_linear(x, layer.values, layer.bias, *indices)
            y = sparse_linear(x, layer.values, layer.bias, *indices)
            results.append((inferred, y, *torch.autograd.grad(y.sum(), (x, layer.values, layer.bias))))
    for outside, inside in zip(*results, strict=True):
        assert inside.dtype is torch.float32 and torch.equal(outside, inside)


def test_forced_methods_are_the_ones_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = SparseLinear(64, 64), torch.randn(4, 64)
    with forced_methods(forward="bitmap"):
        assert layer.explain(4).chosen["forward"] == "bitmap" and "forced" in layer.explain(4).reason
        with forced_methods(forward="row-wise"):
            assert layer.explain(4).chosen["forward"] == "row-wise"
        layer(x)
    with pytest.raises(KernelError, match="expected a product and one of its methods"), forced_methods(forward="magic"):
        pass
    with pytest.raises(KernelError, match="expected a product"), forced_methods(backward="dense"):
        pass


def test_an_unknown_preference_is_refused_by_the_op() -> None:
    pattern = SparseLinear(4, 4, density=1.0).pattern
    with pytest.raises(KernelError, match="'speed' or 'memory'"), kernels.forced(BEST):
        sparse_linear(torch.randn(2, 4), torch.randn(16), None, pattern.crow_indices, pattern.col_indices, "fast")


def test_the_definition_has_no_choice() -> None:
    with kernels.forced("reference"):
        explanation = SparseLinear(8, 8).explain(3)
    assert set(explanation.chosen.values()) == {"row-wise"} and "not measured" in str(explanation)


@pytest.mark.parametrize("method", ["bucketed", "row-wise", "bitmap"])
def test_an_infinite_input_reaches_only_what_is_connected_to_it(backend: Backend, method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = SparseLinear(33, 20, sparsity=0.7, bias=False, generator=generator)
    with torch.no_grad():  # whole numbers, whose sums are the same in any order
        layer.values.copy_(torch.randint(1, 4, layer.values.shape, generator=generator))
    x = torch.randint(-3, 4, (70, 33), generator=generator).float()  # more tokens than are copied at a time
    infinite = x.clone()
    infinite[[1, 8, 69], 5] = torch.inf
    reached = infinite.isinf().any(1, keepdim=True) & layer.pattern.to_mask()[:, 5]
    for dtype in (torch.float32, torch.bfloat16):
        with forced_methods(forward=method):
            y, expected = layer.to(dtype)(infinite.to(dtype)), layer(x.to(dtype))
        assert torch.equal(y.isinf(), reached)
        assert torch.equal(y[~reached], expected[~reached])


@pytest.mark.parametrize("batch", [torch.ones(3, 12), None, -1, 2.5])
def test_what_is_no_number_of_tokens_is_not_explained(batch) -> None:
    with pytest.raises(ValueError, match="expected the number of tokens of a batch, such as 128, got"):
        SparseLinear(12, 8).explain(batch)
