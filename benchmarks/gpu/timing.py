"""Times on a GPU: sides in turns, from CUDA graphs where all can be captured, over operands that no cache holds."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from contenders import Refused
from measure import Timing

Call = Callable[[], object]
Operands = TypeVar("Operands")
MOST_CALLS_A_GRAPH = 1000


@dataclass(frozen=True)
class Deadline:
    """When a part has to stop, by the monotonic clock."""

    end_seconds: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        return cls(time.monotonic() + seconds)

    @property
    def left_seconds(self) -> float:
        return self.end_seconds - time.monotonic()


@dataclass(frozen=True)
class Effort:
    """How much is measured of each side: rounds, and how long the burst of calls in a round takes."""

    rounds: int = 21
    burst_seconds: float = 2e-3


QUICK = Effort(rounds=5, burst_seconds=5e-4)


def race(sides: Mapping[str, Sequence[Call]], effort: Effort, graphs: bool = True) -> tuple[dict[str, Timing], bool]:
    """Seconds of one call of each side, a median's worth of rounds; the sides take turns in an order that rotates.

    A side is its call once for every copy of its operands; a burst goes through all of them, again and again. All sides
    run from CUDA graphs or, where one of them cannot be captured (or without `graphs`), none: the second result. Raises
    `Refused` where that is the fault of another one.
    """
    tours = {name: _tours(calls, effort.burst_seconds) for name, calls in sides.items()}
    replays = _captured(sides, tours) if graphs else None
    runs = replays or {name: _run(calls, tours[name]) for name, calls in sides.items()}
    for run in runs.values():
        run()
    torch.cuda.synchronize()
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(effort.rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            runs[name]()
            end.record()
            marks[name].append((begin, end))
    torch.cuda.synchronize()  # not in between: the queue stays full, so that launches do not show
    times = {
        name: Timing(tuple(b.elapsed_time(e) * 1e-3 / (tours[name] * len(sides[name])) for b, e in pairs))
        for name, pairs in marks.items()
    }
    return times, replays is not None


def copies(operands: Operands, read_bytes: int) -> list[Operands]:
    """The operands and as many clones as it takes for a tour of all of them to read twice the L2 cache or more."""
    return [operands, *(clone(operands) for _ in range(copies_needed(read_bytes) - 1))]


def copies_needed(read_bytes: int) -> int:
    """How many operands of so many bytes no cache holds: twice the L2 between two visits of the same one."""
    cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, math.ceil(2 * cache_bytes / max(read_bytes, 1)) + 1)


def clone(operands: Operands) -> Operands:
    """Tensors anew, also those inside of tuples and dataclasses."""
    if isinstance(operands, Tensor):
        return operands.clone()
    if isinstance(operands, (tuple, list)):
        return type(operands)(clone(one) for one in operands)
    if is_dataclass(operands) and not isinstance(operands, type):
        return replace(operands, **{f.name: clone(getattr(operands, f.name)) for f in fields(operands) if f.init})
    return operands


def _tours(calls: Sequence[Call], seconds: float) -> int:
    """How often all copies fit into `seconds`, at least once; compiles and warms up on the way."""
    run = _run(calls, 1)
    run()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    tours = math.ceil(seconds / max(begin.elapsed_time(end) * 1e-3, 1e-6))
    return max(1, min(tours, MOST_CALLS_A_GRAPH // len(calls)))


def _run(calls: Sequence[Call], tours: int) -> Call:
    """Several tours; the results of one live until the next, so that all of them are written to other memory."""

    def run() -> None:
        results: deque[object] = deque(maxlen=len(calls))
        for _ in range(tours):
            for call in calls:
                results.append(call())

    return run


def _captured(sides: Mapping[str, Sequence[Call]], tours: Mapping[str, int]) -> dict[str, Call] | None:
    """A graph of each side's burst, or None if one cannot be captured."""
    replays = {}
    for name, calls in sides.items():
        try:
            replays[name] = captured(_run(calls, tours[name]))
        except RuntimeError as problem:  # it waits for the device, say
            torch.cuda.synchronize()
            if is_of_an_earlier_capture(problem):
                raise Refused(
                    "torch is still in a capture that failed before: all times would be of launches"
                ) from None
            return None
    return replays


def captured(call: Call) -> Call:
    """The replay of what `call` launches. Raises `RuntimeError` for a call that waits for the device."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    stream = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            call()
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own (torch 2.13)
    return graph.replay


def is_of_an_earlier_capture(problem: RuntimeError) -> bool:
    """Whether torch says that it is still capturing, as some versions do once a capture has failed."""
    return "captures_underway" in str(problem)
