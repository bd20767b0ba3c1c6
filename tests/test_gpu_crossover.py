"""What `offpath crossover --device cuda` would measure, as far as it can be told without a GPU."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from offpath import pattern as patterns
from offpath.cost.bounds import excess, expected
from offpath.cost.crossover import (
    DENSE,
    OFFPATH,
    PRODUCTS,
    SEMI_STRUCTURED,
    TF32,
    Case,
    Contender,
    Outcome,
    Point,
    measure,
)
from offpath.kernels.gpu import rates
from offpath.kernels.gpu.costs import layer_seconds, row_seconds
from offpath.kernels.gpu.rates import Rates, is_complete
from offpath.ops import forced_methods
from offpath.studies.crossover import CrossoverConfig, CrossoverResult, contenders, on_gpu
from offpath.studies.crossover.config import grid_for
from offpath.studies.crossover.contenders import Layers, Workload
from offpath.studies.crossover.tables import blocks, measured_on
from test_gpu_backend import _run, without_gpu


@without_gpu
@pytest.mark.parametrize("command", [("crossover", "--quick"), ("train", "--quick")])
def test_commands_say_what_is_missing(command: tuple[str, ...], tmp_path: Path) -> None:
    arguments = [*command, "--device", "cuda", "--out", str(tmp_path / "run")]
    finished = _run(f"from offpath_cli import main; import sys; sys.argv[1:] = {arguments}; main()")
    assert finished.returncode == 1 and finished.stderr.count("\n") == 1, finished.stderr
    assert finished.stderr.startswith("error: expected a ") and not (tmp_path / "run").exists()


def test_a_gpu_has_a_grid_of_its_own() -> None:
    for quick in (True, False):
        assert CrossoverConfig(**grid_for("cuda", quick), device="cuda").batches != CrossoverConfig().batches
    assert CrossoverConfig.from_json(CrossoverConfig(device="cuda").to_json()).device == "cuda"
    older = {name: value for name, value in CrossoverConfig().to_json().items() if name != "device"}
    assert CrossoverConfig.from_json(older).device == "cpu"


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Layers on the CPU that take themselves for a GPU's; the list says how many calls each graph would hold."""
    made: list[int] = []

    def captured(calls):
        made.append(len(calls))
        return on_gpu.in_turns(calls)

    monkeypatch.setattr(contenders, "captured", captured)
    monkeypatch.setattr(contenders, "copies_for", lambda weight_bytes: 3)
    return made


@pytest.mark.parametrize("product", PRODUCTS)
def test_ways_are_timed_over_copies_of_the_layer(product: str, as_on_a_gpu: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = Layers(patterns.random((24, 20), 100, generator), torch.float32, generator)
    for copy in (layers.copy(), layers.copy()):
        assert copy.sparse.values.data_ptr() != layers.sparse.values.data_ptr()
        assert copy.sparse.connections.col_indices.data_ptr() != layers.sparse.connections.col_indices.data_ptr()
        assert torch.equal(copy.weight, layers.weight) and copy.weight.data_ptr() != layers.weight.data_ptr()
    layers.on_gpu = True
    workload = Workload(layers, 7, generator)
    ways = workload.contenders(product)
    assert [way.method for way in ways[:2]] == [DENSE, OFFPATH] and ways[-1].method == TF32
    with forced_methods(forward="row-wise", dx="row-wise", dvalues="row-wise"):
        outcomes = measure(ways, 0.001)
    assert {(o.method, o.status) for o in outcomes} >= {(m, "measured") for m in (DENSE, OFFPATH, TF32)}
    assert set(as_on_a_gpu) == {3} and len(layers.replicas) == 3
    assert all(o.timing.calls_a_round % 3 == 0 for o in outcomes if o.timing and o.method != "torch.sparse")


def test_seconds_are_those_of_one_call() -> None:
    ticks = iter(range(10**6))
    result = torch.ones(1)
    right = expected(torch.ones(1).double(), torch.ones(1), torch.tensor(1), torch.float32)
    once = Contender(DENSE, "", lambda: [result], [right])
    thrice = Contender(DENSE, "", lambda: [result], [right], repeated=lambda: (lambda: None, 3))
    plain, repeated = (measure([c], 1.0, clock=lambda: float(next(ticks)))[0].timing for c in (once, thrice))
    assert repeated.median_seconds == pytest.approx(plain.median_seconds / 3)


def test_tf32_is_held_to_its_own_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(32, 400, generator=generator) for _ in range(2))

    def rounded(operand: torch.Tensor, bits: int) -> torch.Tensor:
        step = 1 << (23 - bits)
        return ((operand.view(torch.int32) + step // 2) & -step).view(torch.float32)

    right = expected(x.double() @ w.double().t(), x.abs() @ w.abs().t(), torch.tensor(400), torch.float32)
    loose = right.with_operands_rounded(on_gpu.TF32_UNIT)
    tf32 = rounded(x, 10) @ rounded(w, 10).t()
    assert excess(tf32, right) is not None and excess(tf32, loose) is None
    assert excess(rounded(x, 3) @ rounded(w, 3).t(), loose) is not None


def test_what_stands_beside_offpath_is_told_below_its_table() -> None:
    config = CrossoverConfig(((8, 8),), (1,), ("float32",), (0.5,), device="cuda")
    outcomes = []
    for method, seconds in ((DENSE, 4.0), (OFFPATH, 2.0), (TF32, 1.0), (SEMI_STRUCTURED, 8.0)):
        timing = measure([Contender(method, "", list, [])], 0.001)[0].timing
        assert timing is not None
        outcomes.append(
            {"method": method, "way": "", "status": "measured", "reason": ""}
            | {"timing": asdict(timing) | {"median_seconds": seconds}}
        )
    point = Point(Case(8, 8, "float32", "forward", 1), 0.5, tuple(map(Outcome.from_json, outcomes)))
    result = CrossoverResult(config, (point,), {"gpu": "H", "backend": "gpu", "torch": "2"}, "", "", 1.0, True)
    (block,) = blocks(result)
    assert any("TF32" in note and "forward at batch 1 4.00x" in note for note in block.notes)
    assert any("2:4" in note and "0.50x" in note for note in block.notes)
    assert measured_on(result) == "H, gpu, torch 2"


# The model of a device's costs: an H200, as far as its data sheet and the shapes of the kernels tell.
BFLOAT16 = Rates(2, 60_000_000, 2e-6, 4.0e12, 7.0e14, 1.0e13, 8.0e12, 1.5e12, 1.5e12, 0.5, 1.8e12, 1e-9)
FLOAT32 = Rates(4, 60_000_000, 2e-6, 4.0e12, 5.0e13, 5.0e12, 4.0e12, 7.0e11, 7.0e11, 0.5, 0.9e12, 1e-9)


def _cheapest(rates: Rates, product: str, size: int, sparsity: float, batch: int) -> str:
    nnz = round(size * size * (1 - sparsity))
    methods = ("row-wise", "dense")
    return min(methods, key=lambda method: layer_seconds(rates, product, method, size, size, nnz, batch))


@pytest.mark.parametrize("product", ["forward", "dx", "dvalues"])
def test_gathers_are_chosen_only_where_the_roofline_lets_them_win(product: str) -> None:
    for size in (4096, 8192):
        assert _cheapest(BFLOAT16, product, size, 0.9, 4096) == "dense"
        assert _cheapest(BFLOAT16, product, size, 0.995, 4096) == "row-wise"
        assert _cheapest(FLOAT32, product, size, 0.5, 4096) == "dense"
        assert _cheapest(FLOAT32, product, size, 0.95, 4096) == "row-wise"
    for product in ("forward", "dx", "dvalues"):
        assert _cheapest(FLOAT32, product, 4096, 0.9, 1) == "row-wise"


def test_few_tokens_share_what_is_read_of_the_weight() -> None:
    shared = replace(BFLOAT16, few_share=0.1)
    for product in ("forward", "dx", "dvalues"):
        one, eight = (layer_seconds(shared, product, "row-wise", 4096, 4096, 2_000_000, batch) for batch in (1, 8))
        assert one < eight < 2 * one
        slower = layer_seconds(replace(shared, few_share=1.0), product, "row-wise", 4096, 4096, 2_000_000, 8)
        assert slower > 1.5 * eight


def test_top_k_rows_are_gathered_from_wide_dictionaries_and_multiplied_densely_from_narrow_ones() -> None:
    for columns, k, sparse_wins in ((131072, 64, True), (65536, 64, True), (512, 64, False)):
        for product in ("matmul", "dots", "weight_gradient"):
            sparse, dense = row_seconds(BFLOAT16, product, 4096 * k, 4096, columns, 4096)
            assert (sparse < dense) == sparse_wins, (product, columns)


def test_costs_grow_with_every_size() -> None:
    for product in ("forward", "dx", "dvalues"):
        for method in ("row-wise", "dense"):
            least = layer_seconds(BFLOAT16, product, method, 1024, 1024, 10_000, 64)
            for larger in ((2048, 1024, 10_000, 64), (1024, 2048, 10_000, 64), (1024, 1024, 20_000, 64)):
                assert layer_seconds(BFLOAT16, product, method, *larger) > least
            assert layer_seconds(BFLOAT16, product, method, 1024, 1024, 10_000, 128) > least


def test_where_launches_take_longer_than_the_work_the_fewest_are_chosen() -> None:
    slow_host = replace(FLOAT32, launch_seconds=25e-6)
    assert _cheapest(FLOAT32, "dx", 1024, 0.95, 512) == "row-wise"
    assert _cheapest(slow_host, "dx", 1024, 0.95, 512) == "dense"
    for product in ("forward", "dvalues"):
        assert _cheapest(slow_host, product, 512, 0.9, 1) == "row-wise"
    # The transposed order of the values is one of torch's launches.
    assert layer_seconds(slow_host, "dx", "row-wise", 512, 512, 26_000, 1) == 1.5 * slow_host.launch_seconds
    assert _cheapest(slow_host, "forward", 4096, 0.98, 4096) == "row-wise"


@pytest.mark.parametrize(("capability", "share"), [((8, 0), 1), ((9, 0), 1), ((8, 6), 1 / 64), ((12, 0), 1 / 64)])
def test_consumer_cards_have_hardly_any_float64(
    capability: tuple[int, int], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    major, minor = capability
    properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=100, L2_cache_size=2**26)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(rates, "_attribute", lambda device, which, otherwise: otherwise)
    of_double, of_single = (rates.calculated(0, dtype).dense_flops for dtype in (torch.float64, torch.float32))
    assert of_double == pytest.approx(share * of_single)  # as products of what the whitepapers say


@pytest.mark.parametrize("found", [None, [], {}, {"element_bytes": 2}, asdict(FLOAT32) | {"call_seconds": 0.0}])
def test_rates_that_are_not_whole_are_measured_again(found: object) -> None:
    assert not is_complete(found)
    assert is_complete(asdict(FLOAT32))
