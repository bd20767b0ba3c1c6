"""The report as a text: the card, what was checked, and a table for each section."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from gpu.card import line
from gpu.sanitizer import summary as sanitizer_summary
from verdicts import Figure, reasons, summary, table

LINE_LENGTH = 140
COPIED_BYTES = 2**30  # by the copy of gpu/expand.py


def show(content: Mapping[str, Any], figures: Sequence[Figure]) -> str:
    """`figures` are those of `content`, judged."""
    console = Console(record=True, width=LINE_LENGTH, highlight=False, file=io.StringIO())
    for text in _head(content):
        console.print(escape(text))
    for section in dict.fromkeys(figure.section for figure in figures):
        console.print(f"\n{escape(section)}")
        console.print(table([figure for figure in figures if figure.section == section]))
    console.print()
    for reason in (*_launched(content["times"]), *reasons(figures)):
        console.print(escape(reason))
    if figures:
        console.print(summary(figures))
    return "\n".join(line.rstrip() for line in console.export_text().split("\n")) + "\n"


def copy_bytes_a_second(times: Iterable[Mapping[str, Any]]) -> float | None:
    """What a large copy moves, counting what it reads and what it writes."""
    medians = [time["median_seconds"] for time in times if time["side"] in ("copy", "copy by a kernel")]
    return 2 * COPIED_BYTES / min(medians) if medians else None


def _head(content: Mapping[str, Any]) -> Iterator[str]:
    yield line(content["card"])
    quick = "; --quick, so no figure is one to quote" if content["quick"] else ""
    yield f"operands drawn with seed {content['seed']}{quick}"
    copied = copy_bytes_a_second(content["times"])
    if copied:
        yield f"a copy of 1 GiB moves {copied / 1e12:.2f} TB/s, reads and writes counted"
    yield ""
    yield from _checks(content["checks"])
    for tool, found in content.get("sanitizer", {}).items():
        yield f"{tool}: {sanitizer_summary(found)}"
        if found.get("clean") is False:
            yield from (f"  {text}" for text in found["lines"])
    for name, part in content["parts"].items():
        if part["status"] != "finished":
            yield f"{name}: {part['status']}"
            yield from (f"  {text}" for text in part.get("said", ()))


def _launched(times: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """What small products must not be judged by: a launch may take longer than they do."""
    launched: dict[str, list[str]] = {}
    for time in times:
        if not time["replayed"]:
            launched.setdefault(time["section"], []).append(f"{time['row']}, {time['column']}")
    for section, figures in launched.items():
        yield f"timed with their launches, not from CUDA graphs, in {section}: {'; '.join(dict.fromkeys(figures))}"


def _checks(checks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not checks:
        yield "no kernel was checked in this run"
        return
    failed = [check for check in checks if check["problems"]]
    for kernel in dict.fromkeys(check["kernel"] for check in checks):
        of_kernel = [check for check in checks if check["kernel"] == kernel]
        worst = max((c["error"] for c in of_kernel if c["error"] is not None), default=None)
        wrong = sum(1 for check in of_kernel if check["problems"])
        error = "" if worst is None else f", relative error at most {worst:.1e}"
        yield f"{kernel}: {len(of_kernel) - wrong} of {len(of_kernel)} cases right{error}"
    for check in failed:
        yield f"  {check['kernel']}, {check['case']}: {'; '.join(check['problems'])}"
