"""Measuring the whole grid, one layer after the other."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn, Protocol

import torch

from offpath import kernels, pattern as patterns
from offpath.cost import this_machine
from offpath.cost.crossover import PRODUCTS, Case, Contender, Point, measure
from offpath.cost.timing import TimingStopped
from offpath.studies.config import RunError
from offpath.studies.crossover.config import DTYPES, CrossoverConfig
from offpath.studies.crossover.contenders import Layers, Workload
from offpath.studies.crossover.on_gpu import synchronized_clock
from offpath.studies.crossover.result import CrossoverResult
from offpath.studies.files import write_text
from offpath.studies.folder import RunFolder
from offpath.studies.interrupt import StopRequest, stop_on_signal

RESULT_FILE = "crossover.json"


# A reference that would take longer than this for one call is left out: at low sparsity it would take most of the time.
REFERENCE_PATIENCE_SECONDS = 2.0


class UnwrittenResult(RunError):
    """The file could not be written; `result` is what was measured."""

    def __init__(self, problem: RunError, result: CrossoverResult) -> None:
        super().__init__(str(problem))
        self.result = result


class CrossoverObserver(Protocol):
    """Whoever watches a crossover."""

    def on_start(self, config: CrossoverConfig) -> None:
        """Called once, before the first layer is made."""

    def on_case(self, case: Case, sparsity: float) -> None:
        """Called before each point with what is checked and measured next."""

    def on_point(self, point: Point) -> None:
        """Called after each point."""


def crossover(config: CrossoverConfig, out: Path, observer: CrossoverObserver, command: str) -> CrossoverResult:
    """Measure `config` on this machine and write `out`/crossover.json; `command` is what the file says was typed.

    Ctrl-C ends it with what was measured so far, and without a file if that is nothing. Raises `RunError` when `out`
    already holds something, `UnwrittenResult` when the file cannot be written, and `KernelError`, which names what is
    missing, when there are no kernels for the device here.
    """
    kernels.default_backend(config.device)
    folder = RunFolder(out)
    with folder.locked():
        if (out / RESULT_FILE).exists():
            raise RunError(f"{out} already holds a {RESULT_FILE}; choose another --out")
        folder.refuse_existing()
        date, start = datetime.now(UTC).isoformat(timespec="seconds"), time.perf_counter()
        machine = asdict(this_machine(config.device))
        points: list[Point] = []

        observer.on_start(config)
        with stop_on_signal() as stop:
            try:
                for point in _points(config, observer, stop):
                    points.append(point)
                    observer.on_point(point)
            except (TimingStopped, KeyboardInterrupt):
                pass  # what was measured until then is written all the same
            seconds, complete = time.perf_counter() - start, len(points) == config.points
            text = CrossoverResult(config, tuple(points), machine, command, date, seconds, complete).to_text()
            # Read back, so that tables and plots show what the file says, to the last digit.
            result = CrossoverResult.from_json(json.loads(text))
            if points:
                try:
                    write_text(out / RESULT_FILE, text)
                except RunError as problem:
                    raise UnwrittenResult(problem, result) from problem
        return result


def _points(config: CrossoverConfig, observer: CrossoverObserver, stop: StopRequest) -> Iterator[Point]:
    generator, device = torch.Generator().manual_seed(config.seed), torch.device(config.device)
    clock = time.perf_counter if device.type == "cpu" else synchronized_clock
    for in_features, out_features in config.shapes:
        # One draw for all sparsities: what exists in a sparser layer exists in a denser one.
        draw = torch.rand(out_features, in_features, generator=generator)
        for dtype, sparsity in itertools.product(config.dtypes, config.sparsities):
            layers = Layers(patterns.from_mask(draw >= sparsity), DTYPES[dtype], generator, device)
            known = _ReferenceTimes()
            for batch in config.batches:
                workload = Workload(layers, batch, generator)
                for product in PRODUCTS:
                    case = Case(in_features, out_features, dtype, product, batch)
                    observer.on_case(case, sparsity)
                    contenders = [known.spare(contender, case) for contender in workload.contenders(product)]
                    point = Point(case, sparsity, measure(contenders, config.budget_seconds, lambda: stop.made, clock))
                    known.learn(point)
                    yield point
                del workload
            del layers  # before the next ones are made: the largest take a gigabyte


class _TooSlow(Exception):
    """A reference would try everybody's patience."""


class _ReferenceTimes:
    """The times of each reference in one layer, by the batch; from two of them, that of a larger batch is guessed."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str], dict[int, float]] = {}

    def learn(self, point: Point) -> None:
        """Remember the times of `point`."""
        for outcome in point.outcomes:
            if outcome.timing:
                times = self._seconds.setdefault((point.case.product, outcome.way), {})
                times[point.case.batch] = outcome.timing.median_seconds

    def spare(self, contender: Contender, case: Case) -> Contender:
        """The contender; one that refuses in its place if it is a reference that would be too slow."""
        times = self._seconds.get((case.product, contender.way), {})
        if not contender.only_for_reference or _guess_seconds(times, case.batch) <= REFERENCE_PATIENCE_SECONDS:
            return contender

        def refuse() -> NoReturn:
            raise _TooSlow(f"left out where a call would take over {REFERENCE_PATIENCE_SECONDS:g} s")

        return replace(contender, run=refuse, refusals=(_TooSlow,), repeated=None)


def _guess_seconds(times: dict[int, float], batch: int) -> float:
    """Linear in the batch, through the two largest ones below it; 0 where fewer are known.

    One is not enough: what a call costs whatever its batch would be taken for a cost of each row.
    """
    known = sorted(smaller for smaller in times if smaller < batch)[-2:]
    if len(known) < 2:
        return 0.0
    low, high = known
    slope = max(times[high] - times[low], 0.0) / (high - low)
    # With fixed costs, time grows at most in proportion, whatever the noise of the two says.
    return min(times[high] + slope * (batch - high), times[high] * batch / high)
