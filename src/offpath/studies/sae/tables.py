"""The table of a race of autoencoders: the same rows on the terminal and in the report."""

from __future__ import annotations

from collections.abc import Callable

from offpath.studies.sae.race import SaeLane, SaeRaceResult

Row = tuple[str, str, str, str]


def race_rows(result: SaeRaceResult) -> list[Row]:
    """Rows of (quantity, dense, sparse, ratio); a ratio above 1 is in favour of the sparse one."""
    lanes = (result.dense, result.sparse)
    rows: list[Row] = []

    def same(name: str, text: Callable[[SaeLane], str]) -> None:
        dense, sparse = (text(lane) for lane in lanes)
        rows.append((name, dense, sparse, ""))

    def add(name: str, value: Callable[[SaeLane], float], text: str, inverse: bool = False) -> None:
        dense, sparse = (value(lane) for lane in lanes)
        ratio = sparse / dense if inverse else dense / sparse
        rows.append((name, text.format(dense), text.format(sparse), f"{ratio:.2f}x"))

    same("explained variance (test)", lambda lane: f"{lane.explained_variance:.2%}")
    same("L0 (test)", lambda lane: f"{lane.test_l0:.1f}")
    same("dead latents", lambda lane: f"{lane.dead:,}")
    add("time a training step (median)", lambda lane: lane.step_seconds_median * 1e3, "{:.2f} ms")
    add("training tokens/s", lambda lane: lane.tokens_per_second, "{:,.0f}", inverse=True)
    same("parameters, gradients, optimizer", lambda lane: f"{lane.bytes.total / 2**20:.1f} MiB")
    add("peak memory of training", lambda lane: lane.peak_memory_bytes / 2**20, "{:.1f} MiB")
    return rows
