"""`offpath bench`: a compressed checkpoint beside the dense model that it was made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import nn

from offpath.cost import Timing, interleaved, this_machine
from offpath.storage import StorageError, load
from offpath.studies.compression.bench_report import write_report
from offpath.studies.compression.compress import MODEL_FILE, MOST, REPORT_FILE, mendable
from offpath.studies.compression.pretrained import Pretrained, open_pretrained, open_tokenizer, quiet, readable
from offpath.studies.compression.quality import embed, embedding_quality, perplexity
from offpath.studies.compression.tokens import Inputs, longest, random_tokens, read_lines, text_windows, token_ids
from offpath.studies.config import RunError, check_seed
from offpath.studies.data import Pairs, check_pairs, load_pairs
from offpath.studies.files import five_digits, read_json, write_text

BENCH_FILE = "bench.json"
DENSE, DENSE_BF16, SPARSE = "dense, float32", "dense, bfloat16", "as saved"
Watch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BenchConfig:
    """What is measured. `pairs` is the set that an encoder is tested on, `data` the text that a decoder predicts.

    Times are those of one text of a few tokens, and of `batch` texts of `tokens`. Raises `RunError` for none,
    and `DataError` for unknown pairs.
    """

    folder: str
    dense: str | None = None
    pairs: str = "python-docs"
    data: str | None = None
    batch: int = 32
    tokens: int = 64
    seconds: float = 10.0
    tested: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name, count in (("batch", self.batch), ("tokens", self.tokens)):
            if not 1 <= count <= MOST:
                raise RunError(f"expected --{name} from 1 to {MOST}, got {count}")
        check_pairs(self.pairs)
        check_seed(self.seed)


QUICK_SECONDS, QUICK_TESTED = 2.0, 50


def bench(config: BenchConfig, out: Path, watch: Watch) -> dict[str, Any]:
    """Measure, write `bench.json` and `report.html` into `out`, and return what stands in the former.

    Raises `RunError` or `DataError`.
    """
    folder = Path(config.folder).expanduser()
    made = _made(folder)
    watch("loading", 0, 1)
    models = _models(config, folder, made)
    decoder = models[DENSE].decoder
    if decoder and config.data is None:
        raise RunError("expected --data, a text file that a decoder is to predict, got none")
    if not decoder and config.data is not None:
        raise RunError("expected no --data for an encoder, which is tested on --pairs; leave it out")
    short = 1 if decoder else min(16, longest(models[DENSE]))
    points = {"latency": (1, short), "throughput": (config.batch, config.tokens)}
    timed = {name: random_tokens(models[DENSE], *point) for name, point in points.items()}
    _make(out)
    with mendable():
        task, accuracy = (_perplexities if decoder else _qualities)(config, models, watch)
        times = {}
        for number, (name, inputs) in enumerate(timed.items()):
            watch("timing", number, len(points))
            calls = {version: partial(_run, pretrained.model, inputs) for version, pretrained in models.items()}
            times[name] = interleaved(calls, config.seconds)
    sizes = {DENSE: 4, DENSE_BF16: 2}
    numbers = sum(p.numel() for p in models[DENSE].model.parameters())
    result = {
        "config": asdict(config) | {"folder": folder.name, "data": Path(config.data).name if config.data else None},
        "decoder": decoder,
        "task": task,
        "points": {name: list(point) for name, point in points.items()},
        "versions": {
            name: {
                "file_bytes": numbers * sizes[name] if name in sizes else (folder / MODEL_FILE).stat().st_size,
                "accuracy": accuracy[name],
                **{f"{point}_seconds": _timing(timings[name]) for point, timings in times.items()},
            }
            for name in models
        },
        "machine": asdict(this_machine()),
    }
    result = five_digits(result)
    write_text(out / BENCH_FILE, json.dumps(result, indent=1) + "\n")
    write_report(result, out)
    return result


def _make(out: Path) -> None:
    """Before anything is measured, so that nothing is measured in vain."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise RunError(f"expected a writable folder {out}, got: {error}; choose another --out") from error


def _made(folder: Path) -> dict[str, Any]:
    if not (folder / REPORT_FILE).is_file():
        raise RunError(f"expected a folder that `offpath compress` made, but {folder} has no {REPORT_FILE}")
    made = read_json(folder / REPORT_FILE, next_step="compress the checkpoint again")
    if not isinstance(made, dict) or not isinstance(made.get("source"), str):
        raise RunError(f"expected the report of `offpath compress` in {folder / REPORT_FILE}, got another")
    return made


def _models(config: BenchConfig, folder: Path, made: dict[str, Any]) -> dict[str, Pretrained]:
    place = config.dense or made["source"]
    try:
        dense = open_pretrained(place)
    except RunError as error:
        raise RunError(f"expected the dense model that {folder} was made of; name it with --dense. {error}") from error
    half = open_pretrained(place)
    half.model.to(torch.bfloat16)
    with quiet(), readable(folder):
        tokenizer = open_tokenizer(folder)
    try:
        model: nn.Module = load(folder / MODEL_FILE)
    except StorageError as error:
        raise RunError(str(error)) from error
    if type(model) is not type(dense.model):
        raise RunError(f"expected a dense {type(model).__name__}, as in {folder}, got a {type(dense.model).__name__}")
    return {DENSE: dense, DENSE_BF16: half, SPARSE: Pretrained(model.eval(), tokenizer, dense.decoder, folder)}


def _qualities(
    config: BenchConfig, models: dict[str, Pretrained], watch: Watch
) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    pairs = _some(load_pairs(config.pairs), config)
    dense = models[DENSE]
    queries, documents = (token_ids(dense, texts) for texts in (pairs.queries, pairs.documents))
    reference = embed(dense, documents, partial(watch, f"testing: {DENSE}"))
    found = {}
    for name, pretrained in models.items():
        asked, there = (embed(pretrained, ids, partial(watch, f"testing: {name}")) for ids in (queries, documents))
        found[name] = asdict(embedding_quality(asked, there, reference))
    return {"name": f"{len(pairs.queries)} pairs of {pairs.name}", "source": pairs.source}, found


def _some(pairs: Pairs, config: BenchConfig) -> Pairs:
    generator = torch.Generator().manual_seed(config.seed)
    places = torch.randperm(len(pairs.queries), generator=generator)[: config.tested].tolist()
    queries, documents = ([texts[place] for place in places] for texts in (pairs.queries, pairs.documents))
    return Pairs(pairs.name, queries, documents, pairs.source)


def _perplexities(
    config: BenchConfig, models: dict[str, Pretrained], watch: Watch
) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    path = Path(str(config.data))
    windows = text_windows(models[DENSE], read_lines(path))[: config.tested]
    found = {}
    for number, (name, pretrained) in enumerate(models.items()):
        watch(f"testing: {name}", number, len(models))
        found[name] = {"perplexity": perplexity(pretrained, windows)}
    return {"name": f"{windows.numel():,} tokens of {path.name}", "source": path.name}, found


def _timing(timing: Timing) -> dict[str, Any]:
    return {"median": timing.median_seconds, "quartiles": list(timing.quartiles_seconds)}


@torch.inference_mode()
def _run(model: nn.Module, inputs: Inputs) -> None:
    model(**inputs)
