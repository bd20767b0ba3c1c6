"""The folder of any study: `study.json` says what is compared, and whatever is finished is a file of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from offpath.studies.config import RunError
from offpath.studies.files import read_json, refuse_other_report, write_text


class _Config(Protocol):
    def to_json(self) -> dict[str, Any]: ...


Config = TypeVar("Config", bound=_Config)


class StudyFolder(Generic[Config]):
    """Where a study keeps its files: `study.json`, and more in folders of its own."""

    config_type: ClassVar[Any]
    folders: ClassVar[tuple[str, ...]]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.study_file = path / "study.json"

    def settle(self, config: Config) -> None:
        """Make the folder one of `config`. Raises `RunError` when it holds another study or cannot be written."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"expected a folder to write to, but {self.path} is a file; choose another --out")
        refuse_other_report(self.path, self.study_file.name)
        try:
            for folder in self.folders:
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"expected a writable folder {self.path}, got: {error}; choose another --out") from error
        if not self.study_file.exists():
            write_text(self.study_file, json.dumps(config.to_json(), indent=1) + "\n")
        elif self.config() != config:
            raise RunError(f"expected this study in {self.path}, but another was started there; choose another --out")

    def config(self) -> Config:
        """The study that is here. Raises `RunError` when its file is missing or broken."""
        try:
            config: Config = self.config_type.from_json(read_json(self.study_file))
        except (TypeError, KeyError, AttributeError) as error:
            raise RunError(
                f"expected the config of this study in {self.study_file}, got: {error}; if another study was started "
                "there, choose another --out"
            ) from error
        return config
