"""What `offpath study` shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from offpath.studies.table import Table
from offpath_cli.display import Display, print_whole


class StudyDisplay(Display):
    """Watches a study: the timing of the steps, then the trials."""

    def __init__(self) -> None:
        super().__init__("now")
        self.finished = 0

    def on_timing(self, task: str, turns: int) -> None:
        self._begin(f"timing steps: {task}", turns)

    def on_turn(self) -> None:
        assert self.task is not None
        self.progress.advance(self.task)

    def on_trials(self, finished: int, total: int, running: Mapping[str, float]) -> None:
        if finished != self.finished:
            self.finished = finished
            self._log(f"{finished} of {total} runs")
        if self.task is None or self.progress.tasks[-1].description != "training":
            self._begin("training", total)
        self._show(finished, now="  ".join(f"{name} {share:.0%}" for name, share in running.items()))

    def _begin(self, description: str, total: int) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(description, total=total, now="")
        self._log(description)


def print_tables(tables: Iterable[Table], display: Display) -> None:
    """Every table, under its title."""
    for table in tables:
        shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for number, heading in enumerate(table.header):
            shown.add_column(Text(heading), justify="right" if number else "left", no_wrap=True)
        for row in table.rows:
            shown.add_row(*(Text(cell.strip("*"), style="bold" if cell.startswith("**") else "") for cell in row))
        display.console.print(Text(table.title, style="bold"))
        print_whole(shown, display.console)


class WatchDisplay(Display):
    """Watches what goes through phases, each with a bar of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""

    def watch(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` parts of `what` are finished."""
        if what != self.phase:
            if self.task is not None:
                self.progress.remove_task(self.task)
            self.phase, self.task = what, self.progress.add_task(what, total=total)
            self._log(what)
        self._show(done)
