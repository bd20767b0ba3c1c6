"""The tables of a crossover: the same rows on the terminal, in the report and in the README."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from offpath.cost.crossover import DENSE, OFFPATH, PRODUCTS, SEMI_STRUCTURED, TF32, TORCH_SPARSE, Case, Point
from offpath.studies.crossover.result import CrossoverResult
from offpath.studies.table import percent

NAMES = {"forward": "forward", "dx": "input gradient", "dweight": "weight gradient", "step": "training step"}
NOT_COMPUTED, WRONG = "—", "WRONG"
BESIDE = {
    TF32: "nn.Linear where float32 may be rounded to TF32",
    SEMI_STRUCTURED: "torch's 2:4 weights, two of every four left",
}
LEGEND = (
    "A ratio is the median time of nn.Linear in the same dtype (of the matrix product alone for the two gradients) "
    "over the sparse layer's: above 1, the sparse layer is faster. Both ran in turns, and every result was compared "
    "with one in float64 before it was timed (of a large layer, in 1024 of its features).",
    "training step: forward and backward with all three gradients, called as a layer is, contiguous input and output; "
    "without the optimizer.",
    "pays from: the smallest sparsity from which on the sparse layer is never slower, interpolated between the two "
    "measured ones around it. ≤ stands before the lowest sparsity measured when it pays at all of them, > before the "
    "highest when it does not pay there.",
    "spread: how far the ratio moves from the median when one side is at its slow quartile and the other at its fast "
    "one; the median of the row.",
    "torch.sparse: where the faster of torch's own CSR products pays, for reference.",
)


@dataclass(frozen=True)
class Block:
    """The table of one shape and dtype, and what has to be said below it."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]
    cases: list[Case]


def blocks(result: CrossoverResult) -> list[Block]:
    """A table for each shape and dtype that was measured, in their order."""
    grouped: dict[tuple[int, int, str], list[Case]] = {}
    for case in result.cases():
        grouped.setdefault((case.in_features, case.out_features, case.dtype), []).append(case)
    header = ("product", "batch", *map(percent, result.config.sparsities), "pays from", "spread", "torch.sparse")
    return [
        Block(
            f"{in_features} → {out_features}, {dtype}",
            header,
            [_row(result, case) for case in _in_order(cases)],
            _notes(result, cases),
            cases,
        )
        for (in_features, out_features, dtype), cases in grouped.items()
    ]


def warnings(result: CrossoverResult) -> list[str]:
    """What must not be overlooked: results that were wrong."""
    return [
        f"WRONG RESULT, so no speed: {NAMES[p.case.product]}, {p.case.in_features} → {p.case.out_features}, "
        f"{p.case.dtype}, batch {p.case.batch}, {percent(p.sparsity)} sparse: {method} is {reason}"
        for p in result.wrong
        for method in (OFFPATH, DENSE)
        for reason in p.reasons(method, "wrong")
    ]


def measured_on(result: CrossoverResult) -> str:
    """The machine in one line."""
    machine = result.machine
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    return f"{where}, {machine['backend']}, torch {machine['torch']}"


def crossover_block(result: CrossoverResult) -> str:
    """The break-evens as GitHub Markdown, with the machine, as they stand in the README."""
    batches = result.config.batches
    lines = [
        f"{measured_on(result)}; the sparsity from which on the sparse layer is never slower than `nn.Linear`:",
        "",
        "| layer | | " + " | ".join(f"batch {batch}" for batch in batches) + " |",
        "|---|---|" + "---:|" * len(batches),
    ]
    for block in blocks(result):
        for product in ("forward", "step"):
            found = {c.batch: _break_even(result, c, OFFPATH) for c in block.cases if c.product == product}
            cells = " | ".join(found.get(batch, "") for batch in batches)
            lines.append(f"| {block.title} | {NAMES[product]} | {cells} |")
    return "\n".join(lines)


def _in_order(cases: list[Case]) -> list[Case]:
    return sorted(cases, key=lambda case: (PRODUCTS.index(case.product), case.batch))


def _row(result: CrossoverResult, case: Case) -> tuple[str, ...]:
    points = {point.sparsity: point for point in result.row(case)}
    ratios = [_cell(points.get(sparsity)) for sparsity in result.config.sparsities]
    spreads = [
        max(high / middle - 1, 1 - low / middle)
        for point in points.values()
        if (middle := point.speedup(OFFPATH)) and (ends := point.speedup_quartiles(OFFPATH))
        for low, high in [ends]
    ]
    spread = f"±{100 * statistics.median(spreads):.0f}%" if spreads else ""
    pays, reference = _break_even(result, case, OFFPATH), _break_even(result, case, TORCH_SPARSE)
    return NAMES[case.product], str(case.batch), *ratios, pays, spread, reference


def _cell(point: Point | None) -> str:
    if point is None:
        return ""
    speedup = point.speedup(OFFPATH)
    if speedup is None:
        wrong = point.reasons(OFFPATH, "wrong") or point.reasons(DENSE, "wrong")
        return WRONG if wrong else NOT_COMPUTED
    return f"{speedup:.2f}x" if speedup < 10 else f"{speedup:.1f}x"


def _break_even(result: CrossoverResult, case: Case, method: str) -> str:
    found = result.break_even(case, method)
    if found is not None:
        return str(found)
    statuses = {o.status for p in result.row(case) for o in p.outcomes if o.method == method}
    return WRONG if "wrong" in statuses else NOT_COMPUTED if statuses else ""


def _notes(result: CrossoverResult, cases: list[Case]) -> list[str]:
    notes: dict[str, None] = {}
    for case in _in_order(cases):
        for point in result.row(case):
            for reason in point.reasons(OFFPATH, "not computed"):
                notes[f"{NOT_COMPUTED} not computed here: {reason}"] = None
            if point.timing(TORCH_SPARSE) is None:
                for reason in point.reasons(TORCH_SPARSE, "not computed"):
                    notes[f"torch.sparse: not computed here: {reason}"] = None
            for reason in point.reasons(TORCH_SPARSE, "wrong"):
                notes[f"torch.sparse: wrong at {percent(point.sparsity)}, batch {case.batch}: {reason}"] = None
    return [*notes, *_beside(result, cases)]


def _beside(result: CrossoverResult, cases: list[Case]) -> Iterator[str]:
    """How fast other ways to compute without offpath are: whoever may use one has to compare with it."""
    for method, what in BESIDE.items():
        found = []
        for case in _in_order(cases):
            speedups = [s for point in result.row(case) if (s := point.speedup(method)) is not None]
            if speedups:
                found.append(f"{NAMES[case.product]} at batch {case.batch} {statistics.median(speedups):.2f}x")
        if found:
            yield f"{what}, over the dense layer: {', '.join(found)}"
