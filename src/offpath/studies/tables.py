"""The table of a race: the same rows on the terminal, in the report and in the README."""

from __future__ import annotations

from collections.abc import Callable

from offpath.studies.race import Lane, RaceResult
from offpath.studies.table import percent

Row = tuple[str, str, str, str]


def race_rows(result: RaceResult) -> list[Row]:
    """Rows of (quantity, dense, sparse, ratio); a ratio above 1 is in favour of the sparse twin."""
    rows: list[Row] = [("test accuracy", f"{result.dense.test_accuracy:.2%}", f"{result.sparse.test_accuracy:.2%}", "")]

    def add(name: str, value: Callable[[Lane], float], text: Callable[[float], str], inverse: bool = False) -> None:
        dense, sparse = value(result.dense), value(result.sparse)
        ratio = sparse / dense if inverse else dense / sparse
        rows.append((name, text(dense), text(sparse), f"{ratio:.2f}x"))

    add("time a training step (median)", lambda lane: lane.step_seconds_median, lambda s: f"{s * 1e3:.2f} ms")
    add("training samples/s", lambda lane: lane.samples_per_second, lambda n: f"{n:,.0f}", inverse=True)
    add("parameter bytes", lambda lane: lane.bytes.parameters, _bytes)
    add("gradient bytes", lambda lane: lane.bytes.gradients, _bytes)
    add("optimizer bytes", lambda lane: lane.bytes.optimizer, _bytes)
    rows.append(("pattern bytes (indices, plans)", "0", _bytes(result.sparse.bytes.pattern), ""))
    add("sum of these bytes", lambda lane: lane.bytes.total, _bytes)
    add("peak memory of training", lambda lane: lane.peak_memory_bytes, _bytes)
    return rows


def to_markdown(result: RaceResult) -> str:
    """The table as GitHub Markdown."""
    lines = ["| | dense | sparse | dense / sparse |", "|---|---:|---:|---:|"]
    lines += ["| " + " | ".join(row) + " |" for row in race_rows(result)]
    return "\n".join(lines)


def demo_block(result: RaceResult) -> str:
    """The table with the machine that it was measured on, as it stands in the README."""
    machine, config = result.machine, result.config
    return (
        f"`{config['model']}` on `{config['data']}`, {percent(config['sparsity'])} sparse, "
        f"batch {config['batch_size']}; "
        f"{machine['processor']}, {machine['threads']} threads, {machine['backend']}, torch {machine['torch']}:\n\n"
        + to_markdown(result)
    )


def _bytes(count: float) -> str:
    return f"{count / 2**20:.2f} MiB"
