"""Every bar of speed beside what this machine reaches: ratios to `nn.Linear`, to SparseLab, and where it breaks even.

Run with: .venv/bin/python benchmarks/bars.py [--quick] [--only SECTION] [--dtype DTYPE] [--json FILE]
Takes under 12 minutes, --quick under 2; far longer without AVX-512, where torch multiplies bfloat16 slowly. Ratios are
medians of interleaved runs; above 1, offpath is faster; behind the "±" stands half the interquartile range of the
ratios of single rounds. Each result is checked against float64 before any time is taken. FILE gets the figures, and
FILE with the ending .txt the tables.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bar_jobs import JOBS, QUICK, Effort, Job, Pair, break_even_figures
from contenders import Refused
from measure import Timing, WrongResult, machine_line, speedup
from offpath.cost import this_machine
from offpath.kernels import KernelError
from offpath.studies.files import write_text
from verdicts import Figure, reasons, summary, table

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C has ended
LINE_LENGTH = 120


@dataclass
class Measured:
    """A job, the pairs of times of all passes so far, and its refused figures if there is nothing to time."""

    job: Job
    passes: list[Sequence[Pair]] = field(default_factory=list)
    refused: list[Figure] | None = None

    def measure(self) -> None:
        """Go through the job once more."""
        if self.refused is not None:
            return
        torch.manual_seed(0)
        try:
            self.passes.append(self.job.measure())
        except (KernelError, Refused) as error:
            self.refused = [replace(figure, refused=str(error)) for figure in self.job.figures]
        except WrongResult as error:
            self._failed(f"wrong result: {error}")
        except Exception as error:  # whatever it is, the figures of the other jobs are not lost for it
            logging.exception("a job failed")
            self._failed(f"{type(error).__name__}: {error}")

    def _failed(self, reason: str) -> None:
        self.refused = [replace(figure, refused=reason, wrong=True) for figure in self.job.figures]

    def figures(self) -> list[Figure]:
        """The figures with their values, or with the reason why there are none."""
        if self.refused is not None:
            return self.refused
        figures = []
        for figure, *pairs in zip(self.job.figures, *self.passes, strict=True):
            slow, fast = (Timing(tuple(s for pair in pairs for s in pair[side].seconds)) for side in (0, 1))
            found = speedup(slow, fast)
            seconds = (slow.median_seconds, fast.median_seconds)
            figures.append(replace(figure, value=found.ratio, spread=found.spread, seconds=seconds))
        return figures


def main(arguments: Sequence[str] | None = None, effort: Effort | None = None) -> int:
    """Measure and print; `effort` stands for what --quick or its absence chooses. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape, fewer sparsities and rounds")
    parser.add_argument("--only", choices=JOBS, action="append", help="one section (may be repeated); default: all")
    parser.add_argument("--json", type=Path, default=Path("runs/bars.json"), help="default: %(default)s")
    parser.add_argument("--dtype", choices=Effort.dtypes, action="append", help="may be repeated; default: both")
    options = parser.parse_args(arguments)
    effort = effort or (QUICK if options.quick else Effort())
    effort = replace(effort, dtypes=tuple(options.dtype or effort.dtypes))
    options.json.parent.mkdir(parents=True, exist_ok=True)

    jobs = [job for section in options.only or JOBS for job in JOBS[section](effort)]
    figures, finished = run(jobs, effort.passes)
    figures += break_even_figures(effort, figures)
    console = Console(record=True, width=LINE_LENGTH, highlight=False)
    show(console, figures)
    if not finished:
        console.print("[red]Interrupted[/]: these are the figures until then.")
    write_text(options.json.with_suffix(".txt"), "\n".join(s.rstrip() for s in console.export_text().split("\n")))
    content = {
        "machine": asdict(this_machine()),
        "effort": asdict(effort),
        "finished": finished,
        "figures": [asdict(figure) | {"verdict": figure.verdict} for figure in figures],
    }
    write_text(options.json, json.dumps(content, indent=1) + "\n")
    if not finished:
        return INTERRUPTED
    return 1 if any(figure.wrong for figure in figures) else 0


def run(jobs: Sequence[Job], passes: int) -> tuple[list[Figure], bool]:
    """The figures of all jobs, and whether Ctrl-C let them finish.

    The jobs are gone through several times: a slow spell of the machine, which lasts for seconds, then takes a share of
    many figures and not the whole of one.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    measured = [Measured(job) for job in jobs]
    finished = True
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=passes * len(jobs))
        try:
            for turn in range(passes):
                for one in measured[:: -1 if turn % 2 else 1]:
                    first = one.job.figures[0]
                    progress.update(task, description=escape(f"{first.section}: {first.row}, {first.column}"))
                    one.measure()
                    progress.advance(task)
        except KeyboardInterrupt:
            finished = False
    return [figure for one in measured if one.passes or one.refused for figure in one.figures()], finished


def show(console: Console, figures: Sequence[Figure]) -> None:
    """The machine, a table for each section, the reasons for what was refused, and the count of bars."""
    console.print(escape(machine_line()))
    for section in dict.fromkeys(figure.section for figure in figures):
        console.print(f"\n[bold]{escape(section)}[/]")
        console.print(table([figure for figure in figures if figure.section == section]))
    console.print()
    for reason in reasons(figures):
        console.print(escape(reason))
    console.print(summary(figures))


if __name__ == "__main__":
    sys.exit(main())
