"""What `offpath crossover` has found, and its JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from offpath.cost.crossover import DENSE, OFFPATH, TORCH_SPARSE, BreakEven, Case, Outcome, Point, break_even
from offpath.studies.crossover.config import CrossoverConfig
from offpath.studies.files import five_digits

FORMAT_VERSION = 1


@dataclass(frozen=True)
class CrossoverResult:
    """All that was measured, on what, when and by which command; not `complete` when it was stopped before its end."""

    config: CrossoverConfig
    points: tuple[Point, ...]
    machine: dict[str, Any]
    command: str
    date: str
    seconds: float
    complete: bool

    def row(self, case: Case) -> list[Point]:
        """The points of one case, by sparsity."""
        return sorted((point for point in self.points if point.case == case), key=lambda point: point.sparsity)

    def cases(self) -> Iterator[Case]:
        """Every case of which there is a point, in the order in which they were measured."""
        return iter(dict.fromkeys(point.case for point in self.points))

    def break_even(self, case: Case, method: str = OFFPATH) -> BreakEven | None:
        """The break-even of `method` against dense; None without a speed, or when a result of the row was wrong."""
        row = self.row(case)
        speedups = [(p.sparsity, s) for p in row if (s := p.speedup(method)) is not None]
        wrong = any(point.reasons(name, "wrong") for point in row for name in (DENSE, method))
        return break_even(speedups) if speedups and not wrong else None

    @property
    def wrong(self) -> list[Point]:
        """The points at which a result of offpath, or the dense one it is compared with, was wrong."""
        return [p for p in self.points if p.reasons(OFFPATH, "wrong") or p.reasons(DENSE, "wrong")]

    def to_text(self) -> str:
        """The result as JSON with a line for each point."""
        head = {
            "format": FORMAT_VERSION,
            "complete": self.complete,
            "date": self.date,
            "command": self.command,
            "seconds": round(self.seconds, 1),
            "machine": self.machine,
            "config": self.config.to_json(),
        }
        points = [_point_to_json(point) for point in self.points]
        lists = {"break_evens": list(self._break_evens()), "points": points}
        text = json.dumps(head, indent=1)[:-2]
        for name, entries in lists.items():
            text += f',\n "{name}": [\n' + ",\n".join("  " + json.dumps(entry) for entry in entries) + "\n ]"
        return text + "\n}\n"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> CrossoverResult:
        """The result whose `to_text` was read. Raises `ValueError` for another format."""
        if values.get("format") != FORMAT_VERSION:
            raise ValueError(f"expected a crossover.json of format {FORMAT_VERSION}, got {values.get('format')!r}")
        points = tuple(_point_from_json(entry) for entry in values["points"])
        rest = {name: values[name] for name in ("machine", "command", "date", "seconds", "complete")}
        return cls(config=CrossoverConfig.from_json(values["config"]), points=points, **rest)

    def _break_evens(self) -> Iterator[dict[str, Any]]:
        for case in self.cases():
            for method in (OFFPATH, TORCH_SPARSE):
                found = self.break_even(case, method)
                if found is not None:
                    yield asdict(case) | {"method": method} | asdict(found)


def _point_to_json(point: Point) -> dict[str, Any]:
    speedups = {method: five_digits(point.speedup(method)) for method in (OFFPATH, TORCH_SPARSE)}
    return (
        asdict(point.case)
        | {"sparsity": point.sparsity, "speedups": speedups}
        | {"outcomes": [five_digits(asdict(outcome)) for outcome in point.outcomes]}
    )


def _point_from_json(values: dict[str, Any]) -> Point:
    case = Case(*(values[name] for name in ("in_features", "out_features", "dtype", "product", "batch")))
    return Point(case, values["sparsity"], tuple(Outcome.from_json(entry) for entry in values["outcomes"]))
