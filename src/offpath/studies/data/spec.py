"""What describes a data set: where its files come from and how to know them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from offpath.studies.data.raw import RawImages

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"


@dataclass(frozen=True)
class WheelSpec:
    """A data set that comes inside the Python package `wheel`; `read` returns its images."""

    name: str
    classes: int
    wheel: str
    read: Callable[[], RawImages]


@dataclass(frozen=True)
class IdxSpec:
    """A data set of four IDX files.

    `sha256` maps each file's plain name to the checksum of its decompressed content, `home_url` is the
    folder that serves the files as `.gz`, `system_dirs` are the folders where the packages that
    `package_commands` install put them.
    """

    name: str
    classes: int
    home_url: str
    sha256: Mapping[str, str]
    system_dirs: tuple[Path, ...] = ()
    package_commands: tuple[str, ...] = ()

    @property
    def next_step(self) -> str:
        """The commands that bring the set to a machine, as one sentence."""
        commands = (f"offpath data {self.name}", *self.package_commands)
        quoted = " or ".join(f"`{command}`" for command in commands)
        return (
            f"{quoted}, or name the folder that holds the files with --data-dir DIR (a study: --data {self.name}=DIR) "
            "or OFFPATH_DATA"
        )


@dataclass(frozen=True)
class ArchiveSpec:
    """A data set of colour images in one archive, or unpacked as one file for each image.

    `sha256` maps the name of each canonical archive to its checksum; `home_url` is the folder that serves them.
    `read_archive(path, sha256, next_step)` and `read_pictures(path, next_step)` return the images of either form.
    """

    name: str
    classes: int
    home_url: str
    sha256: Mapping[str, str]
    read_archive: Callable[[Path, str, str], RawImages]
    read_pictures: Callable[[Path, str], RawImages]

    @property
    def next_step(self) -> str:
        """How to bring the set to a machine, as one sentence."""
        return (
            f"`offpath data {self.name}`, or name the folder of an archive with --data-dir DIR (a study: --data "
            f"{self.name}=DIR) or OFFPATH_DATA, or a folder or zip of train/<class>/* and test/<class>/* images"
        )
