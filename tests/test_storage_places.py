"""Where a model may be saved, and what of it may not: refused before anything is written."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offpath
from offpath import SparseLinear, StorageError
from offpath.nn import Int8Embedding


class Holder(nn.Module):
    """A tensor by any name."""

    def __init__(self, tensor: Tensor, name: str = "tensor") -> None:
        super().__init__()
        self.register_buffer(name, tensor)


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="which is a device, a pipe or a socket"):
        offpath.save(nn.Linear(2, 2), tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_the_error_names_the_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"expected a folder to write m into, got {tmp_path / 'no'}; make it"):
        offpath.save(nn.Linear(2, 2), tmp_path / "no" / "m")
    (tmp_path / "link").symlink_to(tmp_path / "no" / "m")
    with pytest.raises(FileNotFoundError, match="make it"):
        offpath.save(nn.Linear(2, 2), tmp_path / "link")


def test_a_link_to_itself_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="symbolic links"):
        offpath.save(nn.Linear(2, 2), tmp_path / "loop")
    assert (tmp_path / "loop").is_symlink()


@pytest.mark.parametrize("model", [None, {}, nn.Linear(2, 2).state_dict()], ids=lambda model: type(model).__name__)
def test_what_is_no_module_is_refused(tmp_path: Path, model: Any) -> None:
    with pytest.raises(StorageError, match=f"expected a model to save, got a {type(model).__name__}"):
        offpath.save(model, tmp_path / "m")
    offpath.save(nn.Linear(2, 2), tmp_path / "m")
    if model is not None:
        with pytest.raises(StorageError, match=f"expected a model to load into, got a {type(model).__name__}"):
            offpath.load(tmp_path / "m", model)


def test_a_name_that_no_reader_would_find_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="other names than __metadata__"):
        offpath.save(Holder(torch.ones(2), "__metadata__"), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["more", "bitmap", "row_counts"])
@pytest.mark.parametrize(
    "layer", [SparseLinear(64, 32, sparsity=0.5), Int8Embedding(4, 3)], ids=lambda layer: type(layer).__name__
)
def test_tensors_added_to_a_sparse_layer_are_refused(tmp_path: Path, layer: nn.Module, name: str) -> None:
    model = nn.Sequential(layer)
    layer.register_buffer(name, torch.ones(2))
    with pytest.raises(StorageError, match=f"layer '0': expected no tensors but those of a .*, got {name}"):
        offpath.save(model, tmp_path / "m")
    delattr(layer, name)
    offpath.save(model, tmp_path / "m")


def test_lazily_negated_and_conjugated_tensors_are_written_out(tmp_path: Path) -> None:
    for tensor in (torch._neg_view(torch.arange(3.0)), torch.tensor([1 + 2j]).conj()):
        offpath.save(Holder(tensor), tmp_path / "m")
        again = offpath.load(tmp_path / "m", Holder(torch.zeros_like(tensor)))
        assert torch.equal(again.tensor, tensor)
