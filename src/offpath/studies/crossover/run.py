"""Measuring the whole grid, one layer after the other."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

import torch

from offpath import pattern as patterns
from offpath.cost import this_machine
from offpath.cost.crossover import PRODUCTS, Case, Point, measure
from offpath.cost.timing import TimingStopped
from offpath.studies.config import RunError
from offpath.studies.crossover.config import DTYPES, CrossoverConfig
from offpath.studies.crossover.contenders import Layers, Workload
from offpath.studies.crossover.result import CrossoverResult
from offpath.studies.files import write_text
from offpath.studies.folder import RunFolder
from offpath.studies.interrupt import StopRequest, stop_on_signal

RESULT_FILE = "crossover.json"


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

    Ctrl-C ends it with what was measured so far. Raises `RunError` when `out` already holds something.
    """
    folder = RunFolder(out)
    with folder.locked():
        folder.refuse_existing()
        if (out / RESULT_FILE).exists():
            raise RunError(f"{out} already holds a {RESULT_FILE}; choose another --out")
        date, start = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.perf_counter()
        machine = asdict(this_machine())
        points: list[Point] = []

        def result() -> CrossoverResult:
            seconds, complete = time.perf_counter() - start, len(points) == config.points
            return CrossoverResult(config, tuple(points), machine, command, date, seconds, complete)

        observer.on_start(config)
        with stop_on_signal() as stop:
            try:
                for point in _points(config, observer, stop):
                    points.append(point)
                    observer.on_point(point)
            except (TimingStopped, KeyboardInterrupt):
                pass  # what was measured until then is written all the same
            write_text(out / RESULT_FILE, result().to_text())
        return result()


def _points(config: CrossoverConfig, observer: CrossoverObserver, stop: StopRequest) -> Iterator[Point]:
    generator = torch.Generator().manual_seed(config.seed)
    for in_features, out_features in config.shapes:
        # One draw for all sparsities: what exists in a sparser layer exists in a denser one.
        draw = torch.rand(out_features, in_features, generator=generator)
        for dtype, sparsity in itertools.product(config.dtypes, config.sparsities):
            layers = Layers(patterns.from_mask(draw >= sparsity), DTYPES[dtype], generator)
            for batch in config.batches:
                workload = Workload(layers, batch, generator)
                for product in PRODUCTS:
                    case = Case(in_features, out_features, dtype, product, batch)
                    observer.on_case(case, sparsity)
                    outcomes = measure(workload.contenders(product), config.budget_seconds, lambda: stop.made)
                    yield Point(case, sparsity, outcomes)
                del workload
            del layers  # before the next ones are made: the largest take a gigabyte
