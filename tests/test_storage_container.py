"""Files that are damaged or no whole safetensors file: refused by name, with the model as it was, in little memory."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file

import offpath
from children import numbers_of
from offpath import StorageError
from storage_cases import Forged, dense_model, must_be_refused, whole_file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return whole_file(tmp_path_factory.mktemp("whole"))


# --- damage: what disks, networks and editors do -------------------------------------------------------------------


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damaged_file_is_loaded(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["flip", "truncate", "insert", "delete", "header length", "zeros"]))
    place = data.draw(st.integers(0, len(whole) - 1))
    if kind == "flip":
        damaged = whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :]
    elif kind == "truncate":
        damaged = whole[:place]
    elif kind == "insert":
        damaged = whole[:place] + data.draw(st.binary(min_size=1, max_size=20)) + whole[place:]
    elif kind == "delete":
        damaged = whole[:place] + whole[place + data.draw(st.integers(1, 20)) :]
    elif kind == "header length":
        damaged = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1))) + whole[8:]
    else:
        damaged = whole[:place] + bytes(len(whole) - place)
    path = tmp_path / "damaged"
    path.write_bytes(damaged)
    if damaged != whole:
        must_be_refused(path)


def test_every_single_byte_counts(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(StorageError):
            offpath.load(path)


# --- the container ------------------------------------------------------------------------------------------------


def _container(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


F32 = {"dtype": "F32", "shape": [2]}


CONTAINERS = {
    "overlapping": {"a": F32 | {"data_offsets": [0, 8]}, "b": F32 | {"data_offsets": [4, 12]}},
    "holes": {"a": F32 | {"data_offsets": [0, 8]}, "b": F32 | {"data_offsets": [12, 20]}},
    "beyond the end": {"a": F32 | {"data_offsets": [0, 2**40]}},
    "negative": {"a": F32 | {"data_offsets": [-8, 0]}},
    "backwards": {"a": F32 | {"data_offsets": [8, 0]}},
    "a product that overflows": {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}},
    "an unknown dtype": {"a": {"dtype": "F9", "shape": [2], "data_offsets": [0, 16]}},
    "metadata of numbers": {"__metadata__": {"offpath": 3}, "a": F32 | {"data_offsets": [0, 8]}},
    "a list": [],
    "deep": b"[" * 100_000,
    "nothing": b"",
    "no text": b"\xff\xfe" * 20,
    "huge and empty": {"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_broken_containers_are_refused(tmp_path: Path, name: str) -> None:
    must_be_refused(_container(tmp_path / "m", CONTAINERS[name], bytes(16)))


def test_files_of_other_kinds_are_told_apart(tmp_path: Path) -> None:
    save_file(dense_model().state_dict(), tmp_path / "plain")
    must_be_refused(tmp_path / "plain", r"got 6 plain tensors; .*load_state_dict\(safetensors")
    sparse, again = dense_model(), dense_model()
    offpath.sparsify(sparse, 0.5)
    save_file(sparse.state_dict(), tmp_path / "sparse")
    must_be_refused(tmp_path / "sparse", r"make it sparse by offpath\.sparsify\(model, filter_fn=")
    tensors = load_file(tmp_path / "sparse")
    offpath.sparsify(again, filter_fn=lambda module, name: name + ".values" in tensors)
    again.load_state_dict(tensors)
    torch.save(dense_model().state_dict(), tmp_path / "pickle")
    must_be_refused(tmp_path / "pickle", "got a zip archive, as torch.save writes one; torch.load reads it")
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    must_be_refused(tmp_path / "pointer", "git lfs pull")
    (tmp_path / "page").write_text("<!DOCTYPE html><html><body>404</body></html>")
    must_be_refused(tmp_path / "page", "download the file itself")
    (tmp_path / "empty").touch()
    must_be_refused(tmp_path / "empty", "expected a whole safetensors file")
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError):
            offpath.load(missing)
    with pytest.raises(StorageError, match="expected a file"):
        offpath.load("/dev/zero")


# --- memory -------------------------------------------------------------------------------------------------------

_BOMB = """
import torch, offpath
from pathlib import Path
offpath.load(WHOLE)
before = peak_bytes()
for path in sorted(Path(FOLDER).iterdir()):
    try:
        offpath.load(path)
    except offpath.StorageError:
        print(peak_bytes() - before)
"""


def test_small_files_that_claim_to_be_large_take_no_memory(tmp_path: Path, whole: bytes) -> None:
    bombs = tmp_path / "bombs"
    bombs.mkdir()
    for number, (size, other) in enumerate([(2**31 - 1, 2**31 - 1), (2**31 - 1, 0), (0, 2**31 - 1), (2**31 - 1, 1)]):
        for layer in ("0", "2"):
            forged = Forged(bombs / f"{number}{layer}", whole)
            forged.header["layers"][layer]["arguments"] |= {"in_features": size, "out_features": other}
            forged.header["layers"][layer]["nnz"] = 2**31 - 1
            forged.write()
    forged = Forged(bombs / "empty bitmap", whole)
    forged.header["layers"]["0"] |= {
        "nnz": 0,
        "arguments": {"in_features": 0, "out_features": 2**31 - 1, "prefer": "speed"},
    }
    forged.tensors |= {"0.bitmap": torch.zeros(0, dtype=torch.uint8), "0.values": torch.zeros(0)}
    forged.write()
    forged = Forged(bombs / "wide", whole)
    forged.header["model"] = {
        "sequential": {
            "children": {
                str(n): {"class": "Linear", "arguments": {"in_features": 2**20, "out_features": 2**20, "bias": True}}
                for n in range(9)
            }
        }
    }
    forged.write()
    (tmp_path / "whole").write_bytes(whole)
    code = _BOMB.replace("WHOLE", repr(str(tmp_path / "whole"))).replace("FOLDER", repr(str(bombs)))
    grown = numbers_of(code)
    assert len(grown) == len(list(bombs.iterdir())) and max(grown) < 2**25
