"""`offpath compress`: a checkpoint pruned, made sparse and saved in a folder of its own."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from offpath.convert import compress, prune
from offpath.convert.compress.compress import PRECISIONS
from offpath.convert.prune.prune import CALIBRATED, METHODS
from offpath.cost import this_machine
from offpath.storage import save
from offpath.studies.compression.compress_report import write_report
from offpath.studies.compression.pretrained import DTYPES, Pretrained, open_pretrained
from offpath.studies.compression.tokens import Inputs, calibration_inputs, longest, random_tokens, read_lines
from offpath.studies.config import RunError, check_seed
from offpath.studies.files import five_digits, write_text

MODEL_FILE, REPORT_FILE = "model.safetensors", "report.json"
CALIBRATION_BATCHES, CALIBRATION_BATCH = 16, 64
QUICK_BATCHES = 2
MOST = 2**20  # texts of a batch, or tokens of a text
# (texts, tokens): what a model is compressed for unless told otherwise. A decoder answers token by token.
ENCODER_EXAMPLE, DECODER_EXAMPLE = (32, 64), (1, 1)
Watch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CompressConfig:
    """What is asked of a checkpoint. `sparsity` None prunes nothing: most weights are zero already.

    `batch` texts of `tokens` are what it is made fast for. `dtype` None keeps that of the checkpoint, or float32 where
    no kernel computes in it. `precision` and `embeddings` may be "int8".
    Raises `RunError` for what contradicts itself.
    """

    model: str
    sparsity: float | None = None
    method: str = "magnitude"
    data: str | None = None
    scope: str | None = None
    distribution: str = "uniform"
    batch: int | None = None
    tokens: int | None = None
    dtype: str | None = None
    precision: str | None = None
    embeddings: str | None = None
    seed: int = 0
    quick: bool = False

    def __post_init__(self) -> None:
        for name, choice, known in (("method", self.method, METHODS), ("dtype", self.dtype, DTYPES)):
            if choice is not None and choice not in known:
                raise RunError(f"expected {name} to be one of {', '.join(known)}, got {choice!r}")
        for name, kept in (("precision", self.precision), ("embeddings", self.embeddings)):
            if kept not in PRECISIONS:
                raise RunError(f"expected --{name} int8 or none at all, got {kept!r}")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise RunError(f"expected sparsity in (0, 1), the share of weights that become zero, got {self.sparsity}")
        calibrated = self.sparsity is not None and self.method in CALIBRATED
        if calibrated and self.data is None:
            raise RunError(f"expected --data, a text file that {self.method} looks at, got none")
        if not calibrated and self.data is not None:
            raise RunError(f"expected --data with --sparsity and one of {', '.join(CALIBRATED)} only; leave it out")
        for name, count in (("batch", self.batch), ("tokens", self.tokens)):
            if count is not None and not 1 <= count <= MOST:
                raise RunError(f"expected {name} from 1 to {MOST}, got {count}")
        check_seed(self.seed)

    def to_json(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        return asdict(self)


def compress_checkpoint(config: CompressConfig, out: Path, watch: Watch) -> dict[str, Any]:
    """Make `out` the folder of the compressed model, and return the report that stands in it as `report.json`.

    Beside it are `model.safetensors`, which `load(out)` reads, `config.json` and the tokenizer. `out` must not
    exist, or be empty; it appears whole or not at all. Raises `RunError` or `DataError`.
    """
    with _new_folder(out) as folder:
        lines = read_lines(Path(config.data)) if config.data else []
        watch("loading", 0, 1)
        pretrained = open_pretrained(config.model)
        model = pretrained.model
        dtype = config.dtype or (pretrained.dtype if pretrained.dtype in DTYPES else "float32")
        dense_bytes = sum(p.numel() for p in model.parameters()) * getattr(torch, pretrained.dtype).itemsize
        example = _example(config, pretrained)
        with mendable():
            pruned = None
            if config.sparsity is not None:
                pruned = _prune(config, config.sparsity, pretrained, lines, watch)
            model.to(DTYPES[dtype])
            compressed = compress(
                model,
                example=example,
                precision=config.precision,
                embeddings=config.embeddings,
                progress=partial(watch, "making layers sparse"),
            )
            watch("saving", 0, 1)
            save(model, folder / MODEL_FILE)
        # Older versions of transformers know it as torch_dtype.
        setattr(model.config, "dtype" if hasattr(model.config, "dtype") else "torch_dtype", DTYPES[dtype])
        model.config.save_pretrained(folder)  # type: ignore[operator, union-attr]
        pretrained.tokenizer.save_pretrained(folder)
        report = {
            "config": config.to_json() | {"data": Path(config.data).name if config.data else None},
            "source": str(pretrained.folder),
            "decoder": pretrained.decoder,
            "example": list(example["input_ids"].shape),
            "dtype": {"checkpoint": pretrained.dtype, "saved": dtype},
            "bytes": {"checkpoint": dense_bytes, "file": (folder / MODEL_FILE).stat().st_size},
            "prune": pruned,
            "compress": compressed.to_dict(),
            "machine": asdict(this_machine()),
        }
        report = five_digits(report)
        write_text(folder / REPORT_FILE, json.dumps(report, indent=1) + "\n")
        write_report(report, folder)
    return report


def _prune(
    config: CompressConfig, sparsity: float, pretrained: Pretrained, lines: list[str], watch: Watch
) -> dict[str, Any]:
    batches = QUICK_BATCHES if config.quick else CALIBRATION_BATCHES
    calibration = calibration_inputs(pretrained, lines, batches, CALIBRATION_BATCH) if lines else None
    head = pretrained.model.get_output_embeddings()  # type: ignore[operator]
    report = prune(
        pretrained.model,
        sparsity,
        config.method,
        calibration,
        config.scope,
        config.distribution,
        filter_fn=lambda module, _: module is not head,
        seed=config.seed,
        progress=partial(watch, f"pruning: {config.method}"),
    )
    if not report.layers:
        raise RunError(f"expected layers to prune, found none: {'; '.join(f'{n}: {r}' for n, r in report.skipped[:4])}")
    return {
        "sparsity": report.sparsity,
        "nnz": report.nnz,
        "layers": [asdict(layer) for layer in report.layers],
        "skipped": report.skipped,
    }


def _example(config: CompressConfig, pretrained: Pretrained) -> Inputs:
    texts, tokens = DECODER_EXAMPLE if pretrained.decoder else ENCODER_EXAMPLE
    return random_tokens(pretrained, config.batch or texts, config.tokens or min(tokens, longest(pretrained)))


@contextmanager
def mendable() -> Iterator[None]:
    """Show what pruning, conversion, storage and the model itself refuse as what it is: about the user's model."""
    try:
        yield
    except (ValueError, RuntimeError, IndexError) as error:
        raise RunError(str(error)) from error


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that gets its name in the end, and is gone if anything is raised."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"expected a new or empty folder, but {out} is not; choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise RunError(f"expected to write {out}, got: {error.strerror}; choose another --out") from error
    try:
        with _said_of(out, beside):
            yield beside
        beside.chmod(0o755)
        try:
            beside.replace(out)
        except OSError as error:
            raise RunError(
                f"expected {out} to stay new or empty, but another process wrote there meanwhile ({error.strerror}); "
                "choose another --out"
            ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _said_of(out: Path, beside: Path) -> Iterator[None]:
    """Name `out` in errors of writing that name `beside`, which is gone when they are read, or nothing at all."""
    try:
        yield
    except (OSError, RunError) as error:
        told = str(error).replace(str(beside.resolve()), str(out)).replace(str(beside), str(out))
        if isinstance(error, OSError) and error.strerror and (error.filename is None or told != str(error)):
            told = f"expected to write {out}, got: {error.strerror}; free space or choose another --out"
        if told == str(error):
            raise
        raise RunError(told) from error
