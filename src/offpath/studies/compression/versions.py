"""Finished versions of the model: what their files take, how fast they are, how good; dense ones beside."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from offpath.convert import compress, densify
from offpath.cost import interleaved, this_machine
from offpath.cost.timing import TimingStopped
from offpath.storage import load, save
from offpath.studies.compression.arms import Arms, StudyStopped
from offpath.studies.compression.pretrained import DTYPES, Pretrained
from offpath.studies.compression.tokens import Inputs, random_tokens
from offpath.studies.files import five_digits, write_text


@dataclass(frozen=True)
class VersionSpec:
    """A model of the study in a dtype; dense, or at a sparsity of the chain and then with int8 embeddings."""

    sparsity: float
    dtype: str

    @property
    def name(self) -> str:
        """The name of its file.

        >>> VersionSpec(0.9, "bfloat16").name, VersionSpec(0.0, "float32").name
        ('sparse-0.9-bfloat16', 'dense-float32')
        """
        return f"sparse-{self.sparsity:g}-{self.dtype}" if self.sparsity else f"dense-{self.dtype}"


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of the parameters of a dense model, as its file holds them: each once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


class Versions:
    """Makes, saves, tests and times the versions: those that are there already are only timed again, all in turns."""

    def __init__(self, arms: Arms) -> None:
        self.arms, self.config, self.folder = arms, arms.config, arms.folder
        self.specs = [VersionSpec(sparsity, dtype) for sparsity in (0.0, *self.config.sparsities) for dtype in DTYPES]

    def run(self) -> None:
        """Make what is missing and time everything. Raises `StudyStopped`."""
        if all(self.folder.version_file(name).exists() for name in ("times", *(spec.name for spec in self.specs))):
            return
        models = {}
        for number, spec in enumerate(self.specs):
            self.arms.watch("making the finished versions", number, len(self.specs))
            pretrained, record = self._made(spec)
            path = self.folder.version_file(spec.name)
            if not path.exists():
                record["tests"] = self.arms.tested(pretrained, f"testing {spec.name}")
                write_text(path, json.dumps(five_digits(record), indent=1) + "\n")
            models[spec.name] = pretrained.model
        self._time(models)

    def _made(self, spec: VersionSpec) -> tuple[Pretrained, dict[str, Any]]:
        pretrained = self.arms.open()
        if not spec.sparsity:
            model = pretrained.model.to(DTYPES[spec.dtype])
            return pretrained, asdict(spec) | {"file_bytes": tensor_bytes(model), "compress": None}
        model = load(self.folder.model_file(spec.sparsity)).eval()
        densify(model)
        model.to(DTYPES[spec.dtype])
        example = random_tokens(pretrained, *self.config.points[-1])
        report = compress(
            model, example=example, embeddings="int8", progress=partial(self.arms.watch, f"compressing {spec.name}")
        )
        path = self.folder.versions / f"{spec.name}.safetensors"
        save(model, path)
        made = Pretrained(model, pretrained.tokenizer, pretrained.decoder, pretrained.folder)
        assert report.end_to_end is not None
        predicted = {
            "swapped": len(report.swapped),
            "predicted_speedup": report.end_to_end.predicted_speedup,
            "measured_speedup": report.end_to_end.measured_speedup,
        }
        return made, asdict(spec) | {"file_bytes": path.stat().st_size, "compress": predicted}

    def _time(self, models: dict[str, nn.Module]) -> None:
        dense = self.arms.open()
        times: dict[str, Any] = {}
        for number, (texts, tokens) in enumerate(self.config.points):
            self.arms.watch(f"timing {texts} x {tokens} tokens", number, len(self.config.points))
            inputs = random_tokens(dense, texts, tokens)
            calls = {name: partial(_run, model, inputs) for name, model in models.items()}
            try:
                found = interleaved(calls, self.config.seconds, stop=lambda: self.arms.stop.made)
            except TimingStopped:
                raise StudyStopped from None
            times[f"{texts}x{tokens}"] = {name: asdict(timing) for name, timing in found.items()}
        record = {"machine": asdict(this_machine()), "times": times}
        write_text(self.folder.version_file("times"), json.dumps(five_digits(record), indent=1) + "\n")


@torch.inference_mode()
def _run(model: nn.Module, inputs: Inputs) -> None:
    model(**inputs)
