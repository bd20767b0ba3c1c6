"""The tables of a study: the same rows on the terminal, in the report and in the docs."""

from __future__ import annotations

from offpath.studies.table import Row, Table, percent
from offpath.studies.topology.config import (
    DENSE,
    GMP_,
    RIGL,
    RIGL_MEAN,
    SET_,
    SET_MEAN,
    SMALL_DENSE,
    STATIC,
    Arm,
    TaskConfig,
)
from offpath.studies.topology.result import Cell, Difference, StudyResult

NAMES = {
    DENSE: "dense", SMALL_DENSE: "small dense", STATIC: "static", SET_: "SET", RIGL: "RigL", GMP_: "GMP",
    SET_MEAN: "SET, mean moment", RIGL_MEAN: "RigL, mean moment",
}  # fmt: skip
# What is compared, one minus the other; None: the dense net.
COMPARISONS = (
    (STATIC, SMALL_DENSE), (SET_, STATIC), (RIGL, STATIC), (RIGL, SET_), (GMP_, RIGL), (STATIC, None), (SET_, None),
    (RIGL, None), (GMP_, None), (SET_MEAN, SET_), (RIGL_MEAN, RIGL), (SET_MEAN, STATIC), (RIGL_MEAN, STATIC),
    (RIGL_MEAN, SET_MEAN), (SET_MEAN, None), (RIGL_MEAN, None),
)  # fmt: skip
KIB = 1024


def tables(result: StudyResult) -> list[Table]:
    """What every arm reached and costs, then what separates from what; both for each task."""
    return [table for task in result.config.tasks for table in (_arms(result, task), _differences(result, task))]


def docs_block(result: StudyResult) -> str:
    """The machine and every table as GitHub Markdown, as they stand in the docs."""
    machine = next((entry["machine"] for entry in result.steps.values()), None)
    seeds = sorted({len(cell.final) for cell in result.cells})
    lines = [] if result.complete else [f"Not all trials are finished: {seeds[0]} to {seeds[-1]} seeds a row."]
    if machine:
        lines.append(
            f"Steps were timed on {machine['processor']}, {machine['threads']} threads, {machine['backend']}, "
            f"torch {machine['torch']}."
        )
    return "\n\n".join(lines + [table.to_markdown() for table in tables(result)])


def arm_name(arm: Arm) -> str:
    """How an arm is called in tables and plots.

    >>> arm_name(Arm("small-dense", 0.9)), arm_name(Arm("dense"))
    ('90% small dense', 'dense')
    """
    return f"{percent(arm.sparsity)} {NAMES[arm.method]}" if arm.sparsity else NAMES[arm.method]


def _arms(result: StudyResult, task: TaskConfig) -> Table:
    quantity = "test accuracy" if task.kind == "images" else "held-out loss"
    header = (
        "", quantity, "seeds", "parameters", "stored, with indices", "kept in training", "a step", "moved",
        "learning rate",
    )  # fmt: skip
    rows = []
    for arm in task.arms:
        cell = result.cell(task.name, arm)
        if cell is not None:
            rows.append((arm_name(arm), *_cell_texts(result, task, cell)))
    return Table(result.title(task.name), header, rows)


def _cell_texts(result: StudyResult, task: TaskConfig, cell: Cell) -> Row:
    seconds = result.seconds_per_step(task.name, cell.arm)
    return (
        f"{_value(task, cell.mean)} ± {_value(task, cell.deviation)}",
        str(len(cell.final)),
        f"{cell.parameters:,}",
        f"{cell.stored_bytes / KIB:,.0f} KiB",
        f"{cell.training_bytes / KIB:,.0f} KiB",
        f"{1e3 * seconds:.2f} ms" if seconds is not None else "",
        f"{cell.moved_share:.0%}" if cell.moved_share is not None and cell.updates and cell.arm.method != GMP_ else "",
        f"{cell.learning_rate:g}",
    )


def _differences(result: StudyResult, task: TaskConfig) -> Table:
    """One row for each comparison, one column for each sparsity; bold where the interval leaves out zero."""
    sparsities = sorted({arm.sparsity for arm in task.arms if arm.sparsity})
    rows = []
    for one, other in COMPARISONS:
        texts = [_difference(result, task, one, other, sparsity) for sparsity in sparsities]
        if any(texts):
            rows.append((f"{NAMES[one]} minus {NAMES[other or DENSE]}", *texts))
    unit = "percentage points of test accuracy" if task.kind == "images" else "held-out loss"
    title = f"{result.title(task.name)}: differences, in {unit}"
    return Table(title, ("", *map(percent, sparsities)), rows)


def _difference(result: StudyResult, task: TaskConfig, one: str, other: str | None, sparsity: float) -> str:
    cells = (
        result.cell(task.name, Arm(one, sparsity)),
        result.cell(task.name, Arm(other, sparsity) if other else Arm(DENSE)),
    )
    found = Difference.between(cells[0], cells[1]) if cells[0] and cells[1] else None
    if found is None:
        return ""
    scale, digits = (100, 2) if task.kind == "images" else (1, 3)
    text = f"{scale * found.mean:+.{digits}f} ± {scale * found.half_width:.{digits}f}"
    return f"**{text}**" if found.separates else text


def _value(task: TaskConfig, value: float) -> str:
    return f"{100 * value:.2f}%" if task.kind == "images" else f"{value:.3f}"
