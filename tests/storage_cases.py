"""Models and files that the tests of storage share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import offpath
from offpath import SparseLinear, StorageError
from offpath.storage.digest import digest


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return module


class Net(nn.Module):
    """What only its own code can build: a tied tensor, a shared module, buffers of every kind."""

    def __init__(self, sizes: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, sizes)
        self.first = nn.Linear(sizes, 40)
        self.again = nn.ModuleList([self.first])
        self.norm = nn.BatchNorm1d(40)
        self.last = nn.Linear(40, sizes, bias=False)
        self.head = nn.Linear(sizes, 50)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.arange(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.norm(self.first(self.embed(x)))))


def sparse_net(sparsity: float = 0.8) -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    offpath.sparsify(net, sparsity, seed=1)
    assert isinstance(net.first, SparseLinear) and net.again[0] is net.first and isinstance(net.head, nn.Linear)
    return net


def saved_model() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    first = SparseLinear(30, 80, sparsity=0.7, generator=generator)  # a bitmap; the other one as columns
    return nn.Sequential(first, nn.ReLU(), SparseLinear(80, 5, sparsity=0.9925, generator=generator), nn.Linear(5, 2))


def dense_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 80), nn.ReLU(), nn.Linear(80, 5), nn.Linear(5, 2))


def whole_file(folder: Path) -> bytes:
    offpath.save(saved_model(), folder / "m")
    return (folder / "m").read_bytes()


def must_be_refused(path: Path, match: str | None = None) -> None:
    """With a model and without: a `StorageError` that names the file, and the model has not changed."""
    dense = dense_model()
    modules, before = list(dense.modules()), {key: value.clone() for key, value in dense.state_dict().items()}
    for model in (dense, None):
        with pytest.raises(StorageError, match=match) as raised:
            offpath.load(path, model)
        assert str(raised.value).startswith(str(path))
    assert list(dense.modules()) == modules
    assert all(torch.equal(tensor, before[key]) for key, tensor in dense.state_dict().items())


class Forged:
    """The parts of a whole file, to be changed and written again as a file whose checksum fits."""

    def __init__(self, path: Path, whole: bytes) -> None:
        path.write_bytes(whole)
        self.path = path
        with safe_open(path, "pt") as file:
            self.header: Any = json.loads(file.metadata()["offpath"])
        self.tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}

    def write(self, text: str | None = None) -> Path:
        text = json.dumps(self.header) if text is None else text
        metadata = {"format": "pt", "offpath": text, "sha256": digest(text, self.tensors)}
        save_file(self.tensors, self.path, metadata)
        return self.path
