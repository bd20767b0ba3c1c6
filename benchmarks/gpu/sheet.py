"""What a part of the run finds: checks, times and figures, written to its file after each of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from measure import Timing
from verdicts import Figure

WAITED_OUT = "the time of this part ran out before it"


@dataclass(frozen=True)
class Check:
    """What is wrong with one kernel on one case (`problems`), and its relative Frobenius error.

    `kernel` is what figures name; a kernel passes when all of its checks do.
    """

    kernel: str
    case: str
    error: float | None
    problems: tuple[str, ...] = ()


@dataclass
class Sheet:
    """The results of one part. `figures` are those of `verdicts`, each with the kernels that have to pass for it."""

    path: Path
    checks: list[Check] = field(default_factory=list)
    figures: list[tuple[Figure, tuple[str, ...]]] = field(default_factory=list)
    times: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, finished: bool = False) -> None:
        """Write all of it beside the file and rename."""
        content = {
            "finished": finished,
            "facts": self.facts,
            "checks": [asdict(check) for check in self.checks],
            "figures": [asdict(figure) | {"kernels": kernels} for figure, kernels in self.figures],
            "times": self.times,
        }
        write_text(self.path, json.dumps(content))

    def add_times(self, figure: Figure, times: Mapping[str, Timing], replayed: Container[str] = ()) -> None:
        """Medians and quartiles of every side, under the names of the figure that they were taken for.

        `replayed` has the sides that ran from CUDA graphs: of the others, launches are timed as well.
        """
        for name, timing in times.items():
            several = len(timing.seconds) > 1
            lower, _, upper = (
                statistics.quantiles(timing.seconds, n=4, method="inclusive") if several else timing.seconds * 3
            )
            self.times.append(
                {
                    "section": figure.section,
                    "row": figure.row,
                    "column": figure.column,
                    "side": name,
                    "replayed": name in replayed,
                    "median_seconds": timing.median_seconds,
                    "quartiles_seconds": (lower, upper),
                    "rounds": len(timing.seconds),
                }
            )


def figure_of(content: Mapping[str, Any]) -> Figure:
    """A figure as a sheet holds it."""
    known = {name: content[name] for name in Figure.__dataclass_fields__}
    return Figure(**known | {"seconds": tuple(known["seconds"]) if known["seconds"] else None})


def judged(figures: Iterable[Mapping[str, Any]], checks: Iterable[Mapping[str, Any]], expected: bool) -> list[Figure]:
    """The figures, without those of kernels that failed a check: no time of a wrong result is reported.

    Where checks were `expected`, of a kernel without one neither.
    """
    problems: dict[str, str] = {}
    passed = set()
    for check in checks:
        if check["problems"]:
            problems.setdefault(check["kernel"], f"{check['kernel']}, {check['case']}: {check['problems'][0]}")
        else:
            passed.add(check["kernel"])
    result = []
    for content in figures:
        figure = figure_of(content)
        wrong = next((problems[name] for name in content["kernels"] if name in problems), None)
        unseen = [name for name in content["kernels"] if expected and name not in passed]
        if wrong:
            figure = replace(
                figure, value=None, spread=None, seconds=None, refused=f"wrong result: {wrong}", wrong=True
            )
        elif unseen and figure.refused is None:
            reason = f"{unseen[0]} was not checked before the time of the checks ran out"
            figure = replace(figure, value=None, spread=None, seconds=None, refused=reason)
        result.append(figure)
    return result


def report_text(content: Mapping[str, Any]) -> str:
    """JSON with five digits of every number, and an entry of a list on each line: more would be noise, and long."""

    def one(value: Any) -> str:
        return json.dumps(_five_digits(value))

    def whole(value: Any) -> str:
        return "[\n  " + ",\n  ".join(map(one, value)) + "\n ]" if isinstance(value, list) and value else one(value)

    return "{\n " + ",\n ".join(f"{json.dumps(name)}: {whole(value)}" for name, value in content.items()) + "\n}\n"


def write_text(path: Path, text: str) -> None:
    """Write beside the file and rename, so that a reader never sees half of it."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text)
    beside.replace(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def _five_digits(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _five_digits(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_five_digits(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
