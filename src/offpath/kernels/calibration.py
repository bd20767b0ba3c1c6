"""Measures what each method costs on this machine: once, in seconds, on first need, and keeps it for later processes.

The table lies in the user's cache directory (`OFFPATH_CACHE_DIR`, else `$XDG_CACHE_HOME/offpath`, else
`~/.cache/offpath`) under a fingerprint of processor, cores, instruction set and versions. A process that finds another
one measuring waits for its table: two that measured at once would disturb each other.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from offpath.kernels import cpu
from offpath.kernels.backend import Backend
from offpath.kernels.costs import BATCHES, DENSITIES, GRID, SIZES, CostTable
from offpath.kernels.methods import METHODS, PreparedMatrix, PreparedWeight

_log = logging.getLogger("offpath")
ROUNDS = 5
# Grid points that no choice could fall on are not measured but scaled up: a bitmap reads its values once for every
# eight tokens, so that it is out of the question long before this.
BITMAP_MEASURED_TO_BATCH = 16


@cache
def cost_table(backend: Backend, dtype: torch.dtype) -> CostTable:
    """What the methods of `backend` cost for `dtype` (float64 follows float32): from the cache, or measured now.

    A cache that cannot be read or written costs the measurement in every process, and a warning.
    """
    dtype = torch.float32 if dtype is torch.float64 else dtype
    path = cache_folder() / f"costs-{_fingerprint(backend, dtype)}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            table = _read(path)
            if table is None:
                table = measure(backend, dtype)
                _write(path, table)
        return table
    except OSError as error:
        _log.warning("offpath measures its kernels in every process: cannot use %s (%s)", path.parent, error)
        return measure(backend, dtype)


def cache_folder() -> Path:
    """Where the tables lie."""
    chosen = os.environ.get("OFFPATH_CACHE_DIR")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offpath"


def processor() -> str:
    """The processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def measure(backend: Backend, dtype: torch.dtype) -> CostTable:
    """Time every method on the grid, on the threads that torch uses now; takes a few seconds.

    The grid is gone through several times and the best time kept, so that a burst of other work on the machine hits
    one round of many points instead of all rounds of one.
    """
    _log.info("offpath measures its %s kernels on this machine, once", dtype)
    generator = torch.Generator().manual_seed(0)
    best = {p: {m: [float("inf")] * len(GRID) for m in methods} for p, methods in METHODS.items()}
    with torch.inference_mode():
        weights = [_random_weight(s, d, dtype, generator) for s in SIZES for d in DENSITIES]
        inputs = {(s, b): torch.randn(b, s, generator=generator).to(dtype) for s in SIZES for b in BATCHES}
        for round_ in range(ROUNDS + 1):
            for i, (size, density, batch) in enumerate(GRID):
                weight, values = weights[size * len(DENSITIES) + density]
                x = inputs[SIZES[size], BATCHES[batch]]
                for product, methods in METHODS.items():
                    for method in methods:
                        if method == "bitmap" and BATCHES[batch] > BITMAP_MEASURED_TO_BATCH:
                            continue
                        start = time.perf_counter()
                        _run(weight, backend, product, method, values, x)
                        seconds = time.perf_counter() - start
                        if round_ > 0:  # the first one makes the plans
                            best[product][method][i] = min(best[product][method][i], seconds)
    for columns in best.values():
        if "bitmap" in columns:
            for i, (_, _, batch) in enumerate(GRID):
                if BATCHES[batch] > BITMAP_MEASURED_TO_BATCH:
                    columns["bitmap"][i] = columns["bitmap"][i - 1] * BATCHES[batch] / BATCHES[batch - 1]
        # The writing out is a small part and takes all densities alike, so each tells of the others. Not the quietest
        # of them: with so many more tries than the other methods have, dense would look faster than it is beside them.
        by_size: dict[tuple[int, int], list[float]] = {}
        for (size, _, batch), seconds in zip(GRID, columns["dense"], strict=True):
            by_size.setdefault((size, batch), []).append(seconds)
        columns["dense"] = [statistics.median(by_size[size, batch]) for size, _, batch in GRID]
    return CostTable.from_measurement(best)


def _random_weight(
    size: int, density: float, dtype: torch.dtype, generator: torch.Generator
) -> tuple[PreparedWeight, Tensor]:
    mask = torch.rand(size, size, generator=generator) < density
    slots = torch.zeros(size, size, dtype=torch.int32)
    slots[mask] = torch.arange(int(mask.sum()), dtype=torch.int32)

    def matrix(mask: Tensor, permutation: Tensor | None) -> PreparedMatrix:
        crow_indices = torch.zeros(size + 1, dtype=torch.int32)
        crow_indices[1:] = mask.sum(1).cumsum(0)
        return PreparedMatrix(crow_indices, mask.nonzero()[:, 1].int(), size, permutation)

    weight = PreparedWeight(matrix(mask, None), lambda: matrix(mask.t(), slots.t()[mask.t()]))
    return weight, torch.randn(int(mask.sum()), generator=generator).to(dtype)


def _run(weight: PreparedWeight, backend: Backend, product: str, method: str, values: Tensor, x: Tensor) -> Tensor:
    if product == "forward":
        return weight.forward(backend, method, values, x, None)
    if product == "dx":
        return weight.dx(backend, method, values, x)
    return weight.dvalues(backend, method, x, x)


def _fingerprint(backend: Backend, dtype: torch.dtype) -> str:
    built = Path(cpu.native_file()).stat()
    facts: list[object] = [processor(), os.cpu_count(), backend.name, str(dtype), torch.__version__, version("offpath")]
    facts += [built.st_size, built.st_mtime_ns, METHODS, SIZES, DENSITIES, BATCHES]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> CostTable | None:
    try:
        seconds = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    complete = isinstance(seconds, dict) and all(
        isinstance(column := seconds.get(product, {}).get(method), list)
        and len(column) == len(GRID)
        and all(isinstance(s, float) and s > 0 for s in column)
        for product, methods in METHODS.items()
        for method in methods
    )
    return CostTable(seconds) if complete else None


def _write(path: Path, table: CostTable) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(table.seconds))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
