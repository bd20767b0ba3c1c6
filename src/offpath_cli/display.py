"""What the commands show: progress bars while they run, tables at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from offpath.cost import Machine, Part
from offpath.studies import RaceResult
from offpath.studies.run import Run
from offpath.studies.table import percent
from offpath.studies.tables import race_rows

# Enough steps to smooth a shown rate, few enough that it follows the run.
SHOWN_STEPS = 20


class Display:
    """A progress bar that lives as long as its block."""

    def __init__(self, *columns: str, quiet: bool = False) -> None:
        # What is shown may hold paths, which are no markup.
        self.console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True, quiet=quiet)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            *(TextColumn("{task.fields[" + column + "]}") for column in columns),
            TimeRemainingColumn(compact=True),
            console=self.console,
            # A file would keep what a bar showed last.
            disable=not (self.console.is_terminal or self.console.is_jupyter),
        )
        self.task: TaskID | None = None

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text)

    def _log(self, text: str) -> None:
        """Print a line where no bar shows how far the work has come."""
        if self.progress.disable:
            self.say(text)

    def _show(self, completed: int, **fields: Any) -> None:
        assert self.task is not None
        self.progress.update(self.task, completed=completed, **fields)


class TrainDisplay(Display):
    """Watches one run."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__("loss", "accuracy", "rate", quiet=quiet)

    def on_start(self, run: Run) -> None:
        config = run.config
        kind = "dense" if config.sparsity == 0 else f"{percent(config.sparsity)} sparse"
        method = f", {config.method}" if config.moves else ""
        self.say(f"{config.model} ({kind}{method}) on {config.data}, seed {config.seed}")
        self.task = self.progress.add_task(
            "training", total=run.total_steps, completed=run.step, loss="", accuracy="", rate=""
        )

    def on_step(self, run: Run) -> None:
        meter = run.meter
        self._show(
            run.step,
            loss=f"loss {meter.loss_sum / meter.samples:.4f}",
            accuracy=f"acc {meter.correct / meter.samples:.1%}",
            rate=f"{_samples_per_second(run):,.0f} samples/s",
        )

    def on_epoch(self, run: Run, record: dict[str, Any]) -> None:
        topology = record["topology"] if run.config.moves else None
        moved = f"  {topology['sparsity']:.1%} sparse  {topology['moved_share']:.1%} moved" if topology else ""
        self.say(
            f"epoch {record['epoch']:>3}  loss {record['train_loss']:.4f}  test loss {record['test_loss']:.4f}  "
            f"test acc {record['test_accuracy']:.2%}  {record['samples_per_second']:>7,.0f}/s{moved}"
        )


class RaceDisplay(Display):
    """Watches a dense run and its sparse twin."""

    def __init__(self) -> None:
        super().__init__("speedup", "accuracy")
        self.accuracy = ""

    def on_start(self, runs: dict[str, Run]) -> None:
        config = runs["sparse"].config
        self.say(
            f"{config.model} on {config.data}: dense against {percent(config.sparsity)} sparse, seed {config.seed}"
        )
        total = sum(run.total_steps for run in runs.values())
        done = sum(run.step for run in runs.values())
        self.task = self.progress.add_task("racing", total=total, completed=done, speedup="", accuracy="")

    def on_chunk(self, runs: dict[str, Run]) -> None:
        rates = {name: _samples_per_second(run) for name, run in runs.items()}
        speedup = f"sparse {rates['sparse'] / rates['dense']:.1f}x" if all(rates.values()) else ""
        self._show(sum(run.step for run in runs.values()), speedup=speedup, accuracy=self.accuracy)

    def on_epoch(self, records: dict[str, dict[str, Any]]) -> None:
        dense, sparse = (records[name]["test_accuracy"] for name in ("dense", "sparse"))
        self.accuracy = f"accuracy {dense:.1%} / {sparse:.1%}"
        self._log(f"epoch {records['dense']['epoch']:>3}  {self.accuracy}")
        assert self.task is not None
        self.progress.update(self.task, accuracy=self.accuracy)

    def on_measuring(self) -> None:
        assert self.task is not None
        self.progress.remove_task(self.task)
        self.task = self.progress.add_task("measuring peak memory", total=None, speedup="", accuracy="")


def print_race(result: RaceResult, display: RaceDisplay) -> None:
    """The table at the end of a race."""
    machine = result.machine
    table = Table("", title=Text(f"{result.config['model']} on {result.config['data']} ({result.data_source})"))
    for heading in ("dense", "sparse", "dense / sparse"):
        table.add_column(heading, justify="right")
    for row in race_rows(result):
        table.add_row(*row)
    print_whole(table, display.console)
    display.say(f"{machine['processor']}, {machine['threads']} threads, {machine['backend']}, torch {machine['torch']}")


def print_whole(table: Table, console: Console) -> None:
    """Print `table` at its full width: on a narrow terminal its lines wrap, which is better than figures cut short."""
    needed = console.measure(table, options=console.options.update(width=sys.maxsize)).maximum
    Console(file=console.file, width=max(needed, console.width)).print(table)


def print_machine(machine: Machine, gpu_parts: Sequence[Part]) -> None:
    """The table of `offpath info`."""
    table = Table(show_header=False, box=None)
    runs = ", ".join(name if runs_here else f"{name} (not on this machine)" for name, runs_here in machine.isas.items())
    for key, value in (
        ("offpath", machine.offpath),
        ("torch", machine.torch),
        ("python", machine.python),
        ("system", machine.system),
        ("processor", f"{machine.processor}, {machine.logical_cores} logical cores"),
        ("backend", f"{machine.backend} ({machine.backend_reason})"),
        ("all backends", ", ".join(machine.backends)),
        ("ISAs built in", runs),
        ("threads", f"{machine.threads} of torch's pool ({machine.thread_pool})"),
        ("kernels", "float32, float64 and bfloat16; any dtype and device with OFFPATH_BACKEND=reference"),
        *((f"GPU: {part.name}", part.detail if part.usable else f"no: {part.detail}") for part in gpu_parts),
    ):
        table.add_row(Text(key, style="bold"), Text(value))
    Console(soft_wrap=True).print(table, highlight=False)


def _samples_per_second(run: Run) -> float:
    seconds = run.meter.step_seconds[-SHOWN_STEPS:]
    return run.samples_per_step * len(seconds) / sum(seconds) if seconds else 0.0
