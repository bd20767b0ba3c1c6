"""`offpath.save`: what lies in the file, what is refused, and what stays when something goes wrong."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune

import offpath
from children import numbers_of
from offpath import SparseLinear, StorageError
from storage_cases import same, sparse_net


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.95, 0.99, 0.999])
def test_the_file_is_as_large_as_the_formula_says(tmp_path: Path, sparsity: float) -> None:
    """4 bytes a value and a bias; 1 bit a position, or 2 bytes a connection and a row, whichever is less."""
    layer = SparseLinear(300, 200, sparsity=sparsity)
    offpath.save(layer, tmp_path / "m")
    with (tmp_path / "m").open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    tensors_bytes = (tmp_path / "m").stat().st_size - 8 - header_bytes
    assert tensors_bytes == 4 * layer.nnz + 4 * 200 + min(300 * 200 // 8, 2 * (layer.nnz + 200))
    assert header_bytes < 900


def test_other_readers_find_plain_tensors_under_the_keys_of_the_state_dict(tmp_path: Path) -> None:
    net = sparse_net()
    offpath.save(net, tmp_path / "m")
    found, state = load_file(tmp_path / "m"), net.state_dict()
    for key in ("embed.weight", "first.values", "first.bias", "last.values", "norm.running_var", "steps", "mask"):
        assert torch.equal(found[key], state[key]) and found[key].dtype == state[key].dtype
    assert set(found) - set(state) == {"first.bitmap", "last.bitmap"}
    with safe_open(tmp_path / "m", "pt") as file:
        header = json.loads(file.metadata()["offpath"])
    assert header["tied"] == {"head.weight": "embed.weight"} and header["shared"] == {"again.0": "first"}


def test_tensors_that_are_not_contiguous_are_written_as_they_look(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Conv2d(3, 4, 3))
    model[0].weight.data = torch.randn(6, 6).t()
    model[1].to(memory_format=torch.channels_last)
    model.register_buffer("row", torch.arange(3.0).expand(2, 3))
    offpath.save(model, tmp_path / "m")
    twin = nn.Sequential(nn.Linear(6, 6), nn.Conv2d(3, 4, 3))
    twin.register_buffer("row", torch.zeros(2, 3))
    assert same(offpath.load(tmp_path / "m", twin), model)


# --- what cannot be saved -----------------------------------------------------------------------------------------


def _pruned() -> nn.Module:
    model = nn.Sequential(SparseLinear(8, 8))
    prune.l1_unstructured(model[0], "values", 0.5)
    return model


def _parametrized() -> nn.Module:
    model = nn.Sequential(SparseLinear(8, 8))
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Identity())
    return model


def _own_layer() -> nn.Module:
    return nn.Sequential(type("MySparseLinear", (SparseLinear,), {})(8, 8))


def _on_meta() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8, device="meta"))


def _sparse_layer_on_meta() -> nn.Module:
    return nn.Sequential(SparseLinear(8, 8, device="meta"))


def _overlapping() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data = model[0].weight.data.t()
    return model


def _tied_values() -> nn.Module:
    model = nn.Sequential(SparseLinear(8, 8), SparseLinear(8, 8))
    model[1].values = model[0].values
    return model


def _no_tensor() -> nn.Module:
    return nn.Sequential(type("Stateful", (nn.Module,), {"get_extra_state": lambda self: {"a": 1}})())


def _sparse_tensor() -> nn.Module:
    model = nn.Module()
    model.register_buffer("weight", torch.eye(3).to_sparse())
    return model


def _of_a_rare_dtype() -> nn.Module:
    model = nn.Module()
    model.register_buffer("weight", torch.zeros(3, dtype=torch.complex128))
    return model


REFUSED = {
    _of_a_rare_dtype: r"got torch\.complex128",
    _pruned: "'0': expected values of its own, but they are computed by a mask",
    _parametrized: "'0' is a ParametrizedSparseLinear",
    _own_layer: "'0' is a MySparseLinear",
    _on_meta: "'0.weight' is on the meta device",
    _sparse_layer_on_meta: "'0.* is on the meta device",
    _overlapping: r"'0\.weight' and '1\.weight' overlap",
    _tied_values: "'1.values' is tied to '0.values'",
    _no_tensor: "got a dict as '0._extra_state'",
    _sparse_tensor: "expected plain tensors in the state_dict.*'weight'",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_cannot_be_stored_is_refused_by_name_and_leaves_an_old_file(tmp_path: Path, make) -> None:
    (tmp_path / "m").write_bytes(b"old")
    with pytest.raises(StorageError, match=REFUSED[make]):
        offpath.save(make(), tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(StorageError, match=r"got the folder .* try .*model\.safetensors"):
        offpath.save(nn.Linear(2, 2), tmp_path)


# --- the file on disk ---------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the same calls fail, with another number."""
    (tmp_path / "m").write_bytes(b"old")
    code = f"""
import resource, signal, torch, offpath
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    offpath.save(torch.nn.Linear(100, 100), {str(tmp_path / "m")!r})
except OSError as error:
    print(int(str(error).startswith("expected to write {tmp_path / "m"}, got: ")))
"""
    assert numbers_of(code) == [1]
    assert (tmp_path / "m").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("moment", ["save_file", "digest"])
def test_ctrl_c_while_saving_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    def interrupted(tensors: object, path: Path, *rest: object) -> None:
        if moment == "save_file":
            Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    (tmp_path / "m").write_bytes(b"old")
    monkeypatch.setattr(f"offpath.storage.saving.{moment}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        offpath.save(nn.Linear(3, 3), tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_links_and_permissions_stay(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    offpath.save(nn.Sequential(nn.Linear(3, 3)), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    assert isinstance(offpath.load(tmp_path / "real"), nn.Sequential)
    offpath.save(nn.Sequential(nn.Linear(3, 3)), tmp_path / "new")
    (tmp_path / "plain").touch()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def _save_often(path: str, seed: int) -> None:
    torch.set_num_threads(1)
    model = nn.Sequential(SparseLinear(400, 300))
    model[0].values.data.fill_(seed)
    for _ in range(20):
        offpath.save(model, path)


def test_processes_that_save_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_save_often, args=(str(tmp_path / "m"), seed)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        if (tmp_path / "m").exists():
            assert len(offpath.load(tmp_path / "m")[0].values.detach().unique()) == 1
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
