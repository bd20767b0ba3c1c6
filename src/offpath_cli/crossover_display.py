"""What `offpath crossover` shows: what is measured now, and the tables at the end."""

from __future__ import annotations

from rich import box
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from offpath.cost.crossover import Case, Point
from offpath.studies.crossover import CrossoverConfig, CrossoverResult
from offpath.studies.crossover.tables import LEGEND, NAMES, NOT_COMPUTED, WRONG, blocks, measured_on, warnings
from offpath.studies.table import percent
from offpath_cli.display import Display, print_whole

# What a point takes on two cores, roughly, for the bar alone: its budget, and the rounds of a large layer.
SECONDS_A_MULTIPLICATION = 4e-11


class CrossoverDisplay(Display):
    """Watches a crossover. Its bar counts work instead of points: they differ by a factor of a hundred in time."""

    def __init__(self) -> None:
        super().__init__()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[now]}"),
            console=self.console,
            disable=self.progress.disable,
        )
        self.budget_seconds = 0.0
        self.layer: tuple[int, int, str] | None = None

    def on_start(self, config: CrossoverConfig) -> None:
        self.budget_seconds = config.budget_seconds
        total = (
            len(config.dtypes)
            * len(config.sparsities)
            * sum(
                self._work(Case(inputs, outputs, dtype, product, batch))
                for inputs, outputs in config.shapes
                for dtype in config.dtypes[:1]
                for product in NAMES
                for batch in config.batches
            )
        )
        self.task = self.progress.add_task("measuring", total=total, now="")

    def on_case(self, case: Case, sparsity: float) -> None:
        now = f"{case.in_features}x{case.out_features} {case.dtype} {percent(sparsity)}, batch {case.batch}: "
        self._update(now=now + NAMES[case.product])
        if (case.in_features, case.out_features, case.dtype) != self.layer:
            self.layer = case.in_features, case.out_features, case.dtype
            self._log("measuring {}x{} {}".format(*self.layer))

    def on_point(self, point: Point) -> None:
        self._update(advance=self._work(point.case))

    def _update(self, **fields) -> None:
        assert self.task is not None
        self.progress.update(self.task, **fields)

    def _work(self, case: Case) -> float:
        return self.budget_seconds + SECONDS_A_MULTIPLICATION * case.batch * case.in_features * case.out_features


def print_crossover(result: CrossoverResult, display: CrossoverDisplay) -> None:
    """The tables, one for each shape and dtype, and how to read them."""
    for block in blocks(result):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for heading in block.header:
            table.add_column(Text(heading), justify="left" if heading == "product" else "right", no_wrap=True)
        before = ""
        for row in block.rows:
            if before and row[0] != before:
                table.add_section()
            # The name stands once above its batches.
            table.add_row(*(_styled(cell) for cell in (row[0] if row[0] != before else "", *row[1:])))
            before = row[0]
        display.console.print(Text(block.title, style="bold"))
        print_whole(table, display.console)
        for note in block.notes:
            display.say(note)
        display.say("")
    for line in LEGEND:
        display.console.print(Text(line, style="dim"), soft_wrap=False)
    display.say(f"\n{measured_on(result)}")
    for warning in warnings(result):
        display.console.print(Text(warning, style="bold red"), soft_wrap=True)


def _styled(cell: str) -> Text:
    if cell == WRONG:
        return Text(cell, style="bold red")
    if cell == NOT_COMPUTED:
        return Text(cell, style="dim")
    if cell.endswith("x"):
        return Text(cell, style="green" if float(cell[:-1]) >= 1 else "yellow")
    return Text(cell)
