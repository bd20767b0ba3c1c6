"""What each way of pruning makes of the embeddings: the dense model, one shot, and the chain of short trainings."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from offpath.convert import prune, sparsify
from offpath.storage import load, save
from offpath.studies.checkpoint import load_checkpoint, save_checkpoint
from offpath.studies.compression.config import DENSE, GMP_, StudyConfig
from offpath.studies.compression.distill import Distillation, is_trained
from offpath.studies.compression.folder import StudyFolder
from offpath.studies.compression.pretrained import Pretrained, open_pretrained
from offpath.studies.compression.quality import EmbeddingQuality, embed, embedding_quality
from offpath.studies.compression.texts import StudyTexts
from offpath.studies.compression.tokens import calibration_inputs, token_ids
from offpath.studies.config import RunError
from offpath.studies.files import five_digits, write_text, write_whole
from offpath.studies.interrupt import StopRequest

CHECKPOINT_SECONDS = 30.0
CALIBRATION_BATCH = 64
Watch = Callable[[str, int, int], None]


class StudyStopped(Exception):
    """Somebody asked for the end."""


class Arms:
    """Makes what is missing of the arms, one file after the other."""

    def __init__(self, config: StudyConfig, folder: StudyFolder, texts: StudyTexts, watch: Watch, stop: StopRequest):
        self.config, self.folder, self.texts, self._watch, self.stop = config, folder, texts, watch, stop
        self.dense: dict[str, Tensor] = {}
        self.tokens: dict[str, tuple[list[list[int]], list[list[int]]]] = {}

    def run(self) -> None:
        """Make every arm that has no file yet. Raises `StudyStopped` between two steps of any of them."""
        for method, sparsity in self.config.arms():
            path = self.folder.arm_file(method, sparsity)
            if path.exists():
                continue
            if method == DENSE:
                pretrained = self.open()
            elif method == GMP_:
                pretrained = self._trained(sparsity)
            else:
                pretrained = self._pruned(method, sparsity)
            tests = self.tested(pretrained, f"testing {method}" + (f" {sparsity:.0%}" if sparsity else ""))
            record = {"method": method, "sparsity": sparsity, "tests": tests}
            write_text(path, json.dumps(five_digits(record), indent=1) + "\n")

    def open(self) -> Pretrained:
        """The dense model, as it came."""
        return open_pretrained(self.config.model)

    def watch(self, what: str, done: int, total: int) -> None:
        """Show how far it is. Raises `StudyStopped` when somebody has asked for that."""
        self._watch(what, done, total)
        if self.stop.made:
            raise StudyStopped

    def tested(self, pretrained: Pretrained, what: str) -> dict[str, dict[str, float]]:
        """The quality on each set of pairs."""
        if not self.dense:
            self._test_dense()
        found: dict[str, EmbeddingQuality] = {}
        for name, (queries, documents) in self.tokens.items():
            asked, there = (embed(pretrained, ids, partial(self.watch, what)) for ids in (queries, documents))
            found[name] = embedding_quality(asked, there, self.dense[name])
        return {name: asdict(quality) for name, quality in found.items()}

    def _test_dense(self) -> None:
        dense = self.open()
        for name, pairs in self.texts.tests.items():
            self.tokens[name] = token_ids(dense, pairs.queries), token_ids(dense, pairs.documents)
            self.dense[name] = embed(dense, self.tokens[name][1], partial(self.watch, "the dense model"))

    def _pruned(self, method: str, sparsity: float) -> Pretrained:
        pretrained = self.open()
        lines = self.texts.train[: self.config.calibration_texts]
        calibration = None
        if method != "magnitude":
            calibration = calibration_inputs(pretrained, lines, -(-len(lines) // CALIBRATION_BATCH), CALIBRATION_BATCH)
        prune(
            pretrained.model,
            sparsity,
            method,
            calibration,
            filter_fn=lambda _, name: is_trained(name),
            progress=partial(self.watch, f"pruning: {method} {sparsity:.0%}"),
        )
        return pretrained

    def _trained(self, sparsity: float) -> Pretrained:
        stage = self.config.sparsities.index(sparsity)
        dense = self.open()
        if self.folder.model_file(sparsity).exists():  # trained, and stopped before it was tested
            return self._stage(dense, sparsity)
        if stage:
            student = self._stage(dense, self.config.sparsities[stage - 1])
        else:
            student = self.open()
            sparsify(student.model, 0, method="magnitude", filter_fn=lambda _, name: is_trained(name))
        ids = token_ids(dense, self.texts.train)
        run = Distillation(self.config, stage, student, ids, self._teacher(dense, ids))
        checkpoint = self.folder.checkpoint_file(sparsity)
        if checkpoint.exists():
            load_checkpoint(run, checkpoint)
        saved = time.monotonic()
        try:
            while run.step < run.total_steps:
                run.advance()
                self.watch(f"training: GMP to {sparsity:.0%}", run.step, run.total_steps)
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    save_checkpoint(run, checkpoint)
                    saved = time.monotonic()
        except StudyStopped:
            save_checkpoint(run, checkpoint)
            raise
        save(run.model, self.folder.model_file(sparsity))
        checkpoint.unlink(missing_ok=True)
        return student

    def _stage(self, dense: Pretrained, sparsity: float) -> Pretrained:
        model = load(self.folder.model_file(sparsity))
        return Pretrained(model, dense.tokenizer, dense.decoder, dense.folder)

    def _teacher(self, dense: Pretrained, ids: list[list[int]]) -> Tensor:
        """The dense model's embeddings of the texts that are trained on, computed once for all stages."""
        path = self.folder.teacher_file
        if not path.exists():
            made = embed(dense, ids, partial(self.watch, "the dense model's embeddings"))
            write_whole(path, lambda file: file.write(to_bytes({"embeddings": made.to(torch.float16)})))
        return _read(path)


def _read(path: Path) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            found: Tensor = file.get_tensor("embeddings")
    except (SafetensorError, OSError) as error:
        raise RunError(f"expected embeddings in {path}, got: {error}; remove it, and it is made again") from error
    return found.float()
