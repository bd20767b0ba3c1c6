"""What loading takes of memory, and that it shares none with the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import offpath
from children import numbers_of
from offpath import SparseLinear, pattern as patterns
from storage_cases import Net, same, sparse_net


def test_long_bitmaps_are_read_and_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offpath.storage.columns._CHUNK_BYTES", 5)
    layer = SparseLinear(37, 29, sparsity=0.6)
    offpath.save(layer, tmp_path / "m")
    assert same(offpath.load(tmp_path / "m"), layer)


def test_what_is_written_into_a_loaded_model_stays_out_of_the_file(tmp_path: Path) -> None:
    offpath.save(sparse_net(), tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    loaded = offpath.load(tmp_path / "m", Net())
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(torch.arange(6)).square().sum().backward()
    optimizer.step()
    assert not same(loaded, sparse_net()) and (tmp_path / "m").read_bytes() == before
    offpath.save(loaded, tmp_path / "m")  # over the file that it is mapped from
    assert same(offpath.load(tmp_path / "m", Net()), loaded)


_PEAK = """
import ctypes, pathlib, torch, offpath
from torch import nn
def built():
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4096, 16384), nn.ReLU(), nn.Linear(16384, 16))
torch.set_num_threads(1)
offpath.save(nn.Sequential(nn.Linear(4, 4)), PATH + ".small")  # what the code itself takes is there before
offpath.load(PATH + ".small")
ctypes.CDLL(None).malloc_trim(0)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = peak_bytes()
model = offpath.load(PATH, built())
print(peak_bytes() - before, model[0].nnz)
"""


def test_loading_takes_memory_in_proportion_to_the_file(tmp_path: Path) -> None:
    """The dense weight is 256 MiB. Loading keeps the file's bytes and 4 bytes a connection, and for a while twice
    these indices and one piece of the bitmap, taken apart."""
    pattern = patterns.random((16384, 4096), 1_300_000, torch.Generator().manual_seed(0))
    model = nn.Sequential(SparseLinear(4096, 16384, pattern=pattern), nn.ReLU(), nn.Linear(16384, 16))
    path = tmp_path / "model.safetensors"
    offpath.save(model, path)
    peak, nnz = numbers_of(_PEAK.replace("PATH", repr(str(path))))
    assert nnz == 1_300_000
    assert peak < 8 * path.stat().st_size < 2**28 / 2
