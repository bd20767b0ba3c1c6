"""What came out of the study of MiniLM, and its JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from offpath.studies.compression.config import StudyConfig
from offpath.studies.compression.folder import StudyFolder
from offpath.studies.compression.pretrained import DTYPES
from offpath.studies.compression.quality import EmbeddingQuality
from offpath.studies.compression.versions import VersionSpec
from offpath.studies.files import read_json

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Arm:
    """A way of pruning at a sparsity: its quality on each set of pairs."""

    method: str
    sparsity: float
    tests: dict[str, EmbeddingQuality]


@dataclass(frozen=True)
class Version:
    """A finished model; of a sparse one, how many layers `compress` swapped, and the speed-ups that it says."""

    sparsity: float
    dtype: str
    file_bytes: int
    compress: dict[str, float] | None
    tests: dict[str, EmbeddingQuality]

    @property
    def name(self) -> str:
        """Its name among the times."""
        return VersionSpec(self.sparsity, self.dtype).name


@dataclass(frozen=True)
class StudyResult:
    """All that is there. `times` holds, for each input, the median seconds of a call of each version by its name."""

    config: StudyConfig
    arms: tuple[Arm, ...]
    versions: tuple[Version, ...]
    times: dict[str, dict[str, float]]
    machine: dict[str, Any] | None
    sources: dict[str, str]

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return len(self.arms) == len(self.config.arms()) and bool(self.times)

    def arm(self, method: str, sparsity: float) -> Arm | None:
        """The arm, if it is there."""
        return next((arm for arm in self.arms if (arm.method, arm.sparsity) == (method, sparsity)), None)

    def speedup(self, point: str, version: Version, dense_dtype: str) -> float:
        """How many times as fast as the dense model in that dtype."""
        return self.times[point][VersionSpec(0.0, dense_dtype).name] / self.times[point][version.name]

    @classmethod
    def collect(cls, folder: StudyFolder, sources: dict[str, str]) -> StudyResult:
        """All that is there by now in the folder of the study."""
        config = folder.config()
        arms = [path for arm in config.arms() if (path := folder.arm_file(*arm)).exists()]
        names = [VersionSpec(sparsity, dtype).name for sparsity in (0.0, *config.sparsities) for dtype in DTYPES]
        versions = [path for name in names if (path := folder.version_file(name)).exists()]
        timed = folder.version_file("times")
        found = read_json(timed) if timed.exists() else {"times": {}, "machine": None}
        values = {
            "format": FORMAT_VERSION,
            "config": config.to_json(),
            "sources": sources,
            "machine": found["machine"],
            "times": {
                point: {name: timing["median_seconds"] for name, timing in timings.items()}
                for point, timings in found["times"].items()
            },
            "arms": [read_json(path) for path in arms],
            "versions": [read_json(path) for path in versions],
        }
        return cls.from_json(values)

    def to_text(self) -> str:
        """The result as JSON, a line for each arm and version."""
        head = {
            "format": FORMAT_VERSION,
            "complete": self.complete,
            "config": self.config.to_json(),
            "sources": self.sources,
            "machine": self.machine,
            "times": self.times,
        }
        text = json.dumps(head, indent=1)[:-2]
        for name, entries in (("arms", self.arms), ("versions", self.versions)):
            lines = ",\n  ".join(json.dumps(asdict(entry)) for entry in entries)
            text += f',\n "{name}": [\n  {lines}\n ]'
        return text + "\n}\n"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StudyResult:
        """The result whose `to_text` was read. Raises `ValueError` for another format."""
        if values.get("format") != FORMAT_VERSION:
            raise ValueError(f"expected a result of format {FORMAT_VERSION}, got {values.get('format')!r}")

        def entry(fields: dict[str, Any]) -> dict[str, Any]:
            return fields | {"tests": {name: EmbeddingQuality(**test) for name, test in fields["tests"].items()}}

        return cls(
            StudyConfig.from_json(values["config"]),
            tuple(Arm(**entry(arm)) for arm in values["arms"]),
            tuple(Version(**entry(version)) for version in values["versions"]),
            values["times"],
            values["machine"],
            values["sources"],
        )
