"""The study's folder: `study.json` says what is compared, and whatever is finished is a file of its own."""

from __future__ import annotations

import json
from pathlib import Path

from offpath.studies.compression.config import StudyConfig
from offpath.studies.config import RunError
from offpath.studies.files import read_json, refuse_other_report, write_text


class StudyFolder:
    """Where the study keeps its files; it is for the process that has locked it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.study_file = path / "study.json"
        self.teacher_file = path / "teacher.safetensors"
        self.arms, self.versions = path / "arms", path / "versions"

    def settle(self, config: StudyConfig) -> None:
        """Make the folder one of `config`. Raises `RunError` when it holds another study."""
        refuse_other_report(self.path, self.study_file.name)
        for folder in (self.arms, self.versions):
            folder.mkdir(exist_ok=True)
        if not self.study_file.exists():
            write_text(self.study_file, json.dumps(config.to_json(), indent=1) + "\n")
        elif self.config() != config:
            raise RunError(f"expected this study in {self.path}, but another was started there; choose another --out")

    def config(self) -> StudyConfig:
        """The study that is here. Raises `RunError` when its file is missing or broken."""
        try:
            return StudyConfig.from_json(read_json(self.study_file))
        except (TypeError, KeyError, AttributeError) as error:
            raise RunError(
                f"expected the config of this study in {self.study_file}, got: {error}; if another study was started "
                "there, choose another --out"
            ) from error

    def arm_file(self, method: str, sparsity: float) -> Path:
        """What came out of a method at a sparsity."""
        return self.arms / f"{method}-{sparsity:g}.json"

    def model_file(self, sparsity: float) -> Path:
        """The model of that stage of the chain."""
        return self.arms / f"gmp-{sparsity:g}.safetensors"

    def checkpoint_file(self, sparsity: float) -> Path:
        """Where that stage of the chain goes on."""
        return self.arms / f"gmp-{sparsity:g}.checkpoint.safetensors"

    def version_file(self, name: str) -> Path:
        """What a finished version of the model takes: a model and its measurements stand side by side."""
        return self.versions / f"{name}.json"
