"""The tables of the study of MiniLM: the same rows on the terminal, in the report and in the docs."""

from __future__ import annotations

from offpath.studies.compression.config import DENSE, GMP_
from offpath.studies.compression.result import StudyResult, Version
from offpath.studies.table import Row, Table

NAMES = {
    DENSE: "dense", "magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT", GMP_: "GMP, distilled",
}  # fmt: skip
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
MB = 1e6


def tables(result: StudyResult) -> list[Table]:
    """What pruning keeps of the embeddings, and what the finished models take; without what is not there yet."""
    return [table for table in (_quality(result), _versions(result)) if table.rows]


def docs_block(result: StudyResult) -> str:
    """The machine and every table as GitHub Markdown, as they stand in the docs."""
    machine = result.machine
    lines = []
    if machine:
        lines.append(
            f"Measured on {machine['processor']}, {machine['threads']} threads, {machine['backend']}, "
            f"torch {machine['torch']}; pairs: {', '.join(result.sources.values())}."
        )
    return "\n\n".join(lines + [table.to_markdown() for table in tables(result)])


def _quality(result: StudyResult) -> Table:
    sets = list(result.sources)
    header = ("", *(f"{what}, {name}" for name in sets for what in ("rank correlation", "retrieval")))
    rows = []
    for method, sparsity in result.config.arms():
        arm = result.arm(method, sparsity)
        if arm is not None:
            cells = [
                cell for name in sets for cell in _test(arm.tests[name].rank_correlation, arm.tests[name].retrieval)
            ]
            name = f"{sparsity:.0%} {NAMES[method]}" if sparsity else NAMES[method]
            rows.append((name, *cells))
    order = {name: number for number, name in enumerate(NAMES.values())}
    rows.sort(key=lambda row: (row[0].split("% ")[0] if "% " in row[0] else "", order[row[0].split("% ")[-1]]))
    return Table("What is left of the embeddings", header, rows)


def _versions(result: StudyResult) -> Table:
    points = list(result.times)
    speeds = [heading for point in points for heading in (f"{_point(point)}", "over fp32", "over bf16")]
    header = ("", "file", "of dense fp32", *speeds, "predicted", "retrieval")
    dense = next((version.file_bytes for version in result.versions if not version.sparsity), 0)
    rows = [_version(result, version, dense) for version in result.versions] if points else []
    return Table("What the finished models take", header, rows)


def _version(result: StudyResult, version: Version, dense_bytes: int) -> Row:
    cells = []
    for point, times in result.times.items():
        over = (result.speedup(point, version, dtype) for dtype in DTYPES)
        cells += [f"{1e3 * times[version.name]:.1f} ms", *(f"{ratio:.2f}x" for ratio in over)]
    name = f"{version.sparsity:.0%} sparse" if version.sparsity else "dense"
    predicted = f"{version.compress['predicted_speedup']:.2f}x" if version.compress else ""
    first = next(iter(version.tests.values()))
    return (
        f"{name}, {DTYPES[version.dtype]}",
        f"{version.file_bytes / MB:.1f} MB",
        f"{version.file_bytes / dense_bytes:.0%}",
        *cells,
        predicted,
        f"{first.retrieval:.1%}",
    )


def _test(rank_correlation: float, retrieval: float) -> Row:
    return f"{rank_correlation:.3f}", f"{retrieval:.1%}"


def _point(point: str) -> str:
    texts, tokens = point.split("x")
    return f"{texts} x {tokens} tokens"
