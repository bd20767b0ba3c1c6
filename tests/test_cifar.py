"""CIFAR-10: the canonical archives, pictures in folders, and everything that can be wrong with them."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from offpath.studies.data import DATASETS, DataError, DataNotFoundError, datasets, download, load
from offpath.studies.data.cifar import CLASSES, TEST_PART, TRAIN_PARTS, read_archive
from offpath.studies.data.locate import DATA_DIR_VARIABLE

SIDE, PYTHON, BINARY = 32, "cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"
PARTS = (*TRAIN_PARTS, TEST_PART)


def _images(seed: int, count: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3)).astype(np.uint8)


def _planes(images: np.ndarray) -> np.ndarray:
    """As the archives have them: all red values of an image, then the green ones, then the blue ones."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def _tar(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _python_files(count: int = 4) -> dict[str, bytes]:
    batches = {name: {b"data": _planes(_images(n, count)), b"labels": [n] * count} for n, name in enumerate(PARTS)}
    return {name: pickle.dumps(batch, protocol=2) for name, batch in batches.items()} | {"batches.meta": b"no pickle"}


def _binary_files() -> dict[str, bytes]:
    rows = {name: np.insert(_planes(_images(n)), 0, n, axis=1) for n, name in enumerate(PARTS)}
    return {f"{name}.bin": values.astype(np.uint8).tobytes() for name, values in rows.items()}


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes `load` expect these checksums instead of the canonical ones."""

    def trust(**sha256: str) -> None:
        monkeypatch.setitem(datasets.DATASETS, "cifar10", replace(DATASETS["cifar10"], sha256=dict(sha256)))

    return trust


@pytest.mark.parametrize(("name", "files"), [(PYTHON, _python_files()), (BINARY, _binary_files())])
def test_both_archives_give_the_images_that_went_in(
    tmp_path: Path, trusting: Callable[..., None], name: str, files: dict[str, bytes]
) -> None:
    trusting(**{name: _tar(tmp_path / name, files)})
    pixels = np.concatenate([_images(n) for n in range(5)]).reshape(20, -1).astype(np.float64) / 255
    for data in (tmp_path / name, tmp_path):
        found = load("cifar10", data)
        assert found.image_shape == (SIDE, SIDE, 3) and found.features == 3 * SIDE * SIDE and found.classes == 10
        assert found.train_labels.tolist() == [n for n in range(5) for _ in range(4)]
        assert found.test_labels.tolist() == [5] * 4 and found.source == str(tmp_path / name)
        expected = torch.from_numpy((pixels - pixels.mean()) / pixels.std())
        assert torch.allclose(found.train_images.double(), expected, atol=1e-5)


def test_environment_names_the_folder(
    tmp_path: Path, trusting: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    trusting(**{BINARY: _tar(tmp_path / BINARY, _binary_files())})
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path))
    assert len(load("cifar10").train_labels) == 20


def _pictures(folder: Path, kind: str = "png") -> Path:
    for number, split in enumerate(("train", "test")):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            Image.fromarray(_images(100 * number + label, 1)[0]).save(folder / split / name / f"0.{kind}")
    return folder


def _zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, Path("some") / "folder" / file.relative_to(folder))
    return path


def test_folder_and_zip_give_the_same_images_and_say_when_they_were_jpeg(tmp_path: Path) -> None:
    folder, lossy = _pictures(tmp_path / "png"), _pictures(tmp_path / "jpg", "jpg")
    from_folder, from_zip = load("cifar10", folder), load("cifar10", _zipped(folder, tmp_path / "images.zip"))
    assert torch.equal(from_folder.train_images, from_zip.train_images)
    assert torch.equal(from_folder.test_images, from_zip.test_images)
    assert from_folder.train_labels.tolist() == list(range(10)) == from_zip.test_labels.tolist()
    assert not from_folder.source.endswith("(JPEG)")
    assert load("cifar10", lossy).source.endswith("(JPEG)")


class _Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle of an unknown archive was opened",)


def test_unknown_archive_is_never_unpickled(tmp_path: Path, trusting: Callable[..., None]) -> None:
    sha256 = _tar(tmp_path / PYTHON, dict.fromkeys(PARTS, pickle.dumps(_Bomb())))
    with pytest.raises(DataError, match=r"to have SHA-256 6d958be.*`offpath data cifar10`"):
        load("cifar10", tmp_path)
    with pytest.raises(pytest.fail.Exception):  # it would have gone off
        read_archive(tmp_path / PYTHON, sha256, "mend it")


@pytest.mark.parametrize("spoil", ["missing", "short", "empty pickle", "no tar"])
def test_broken_archive_is_told(tmp_path: Path, spoil: str) -> None:
    path = tmp_path / BINARY
    files = _binary_files()
    if spoil == "missing":
        del files["data_batch_3.bin"]
    elif spoil == "short":
        files["test_batch.bin"] = files["test_batch.bin"][:-1]
    elif spoil == "empty pickle":
        files = _python_files() | {"data_batch_1": b""}
    sha256 = _tar(path, files)
    if spoil == "no tar":
        path.write_bytes(b"something else")
        sha256 = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(DataError, match="to hold the six parts of CIFAR-10"):
        read_archive(path, sha256, "mend it")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "test" / "cat" / "0.png").unlink(), r"in test; got missing: \['cat'\], unknown: \[\]"),
        (lambda f: (f / "train" / "dog").rename(f / "train" / "wolf"), r"missing: \['dog'\], unknown: \['wolf'\]"),
        (lambda f: (f / "train" / "dog" / "0.png").write_bytes(b"no image"), r"train/dog/0.png in .* a whole image"),
        (
            lambda f: Image.new("L", (32, 32)).save(f / "train" / "dog" / "0.png"),
            r"RGB of 32 x 32; got shape \(32, 32\)",
        ),
        (lambda f: Image.new("RGB", (64, 32)).save(f / "train" / "dog" / "0.png"), r"got shape \(32, 64, 3\)"),
    ],
)
def test_wrong_pictures_are_named(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(_pictures(tmp_path / "images"))
    with pytest.raises(DataError, match=message):
        load("cifar10", tmp_path / "images")


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match="to be a readable folder or zip"):
        load("cifar10", tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("readme.txt", "nothing here")
    with pytest.raises(DataError, match=r"to hold train/<class>/\*\.png"):
        load("cifar10", tmp_path / "b.zip")
    with pytest.raises(DataNotFoundError, match=rf"none in {tmp_path}/nowhere; next step: `offpath data"):
        load("cifar10", tmp_path / "nowhere")


def test_download_is_verified_and_enters_the_folder_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    sha256 = _tar(home / PYTHON, _python_files())
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(home)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        spec = replace(
            DATASETS["cifar10"], home_url=f"http://127.0.0.1:{server.server_port}/", sha256={PYTHON: "0" * 64}
        )
        monkeypatch.setitem(datasets.DATASETS, "cifar10", spec)
        with pytest.raises(DataError, match=r"to have SHA-256 0{64}; got .*try again later"):
            download("cifar10", tmp_path / "data")
        assert list((tmp_path / "data").iterdir()) == []
        monkeypatch.setitem(datasets.DATASETS, "cifar10", replace(spec, sha256={PYTHON: sha256}))
        folder = download("cifar10", tmp_path / "data")
        assert [path.name for path in folder.iterdir()] == [PYTHON] and len(load("cifar10", folder).test_labels) == 4
        (home / PYTHON).unlink()
        assert download("cifar10", tmp_path / "data") == folder  # it is there, and intact
        (folder / PYTHON).write_bytes(b"broken")
        with pytest.raises(DataError, match="a download from http"):
            download("cifar10", tmp_path / "data")
        assert (folder / PYTHON).read_bytes() == b"broken"
    finally:
        server.shutdown()
        server.server_close()
