"""The folder of the study of pruning: `arms` are the ways of pruning, `versions` the finished models."""

from __future__ import annotations

from pathlib import Path

from offpath.studies import study_folder
from offpath.studies.compression.config import StudyConfig


class StudyFolder(study_folder.StudyFolder[StudyConfig]):
    """Where the study keeps its files; it is for the process that has locked it."""

    config_type = StudyConfig
    folders = ("arms", "versions")

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.teacher_file = path / "teacher.safetensors"
        self.arms, self.versions = (path / folder for folder in self.folders)

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
