"""File -> model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from offpath.storage.architecture import build
from offpath.storage.contents import read, said_of
from offpath.storage.errors import StorageError
from offpath.storage.fitting import fit

FILE_IN_FOLDER = "model.safetensors"
_Model = TypeVar("_Model", bound=nn.Module)


@torch.inference_mode(False)  # parameters that are made in inference mode could not be trained
def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model that `save` wrote to `path`, or to `model.safetensors` in the folder `path`.

    `model` is one of the same architecture, dense as its code builds it (on the meta device, it takes no memory) or
    sparse already: its layers are exchanged for those of the file, its tensors for those of the file, and it is
    returned. Build the optimizer afterwards. Without `model`, what `save` has described is built and returned in
    `eval()` mode; classes come from torch, offpath and `transformers` alone, and no code of the file's is ever run.

    The file is mapped into memory: its tensors are read when they are needed, and what is written into them stays out
    of the file. Do not overwrite it in place as long as the model lives; `save` does not.
    Raises `StorageError`, and leaves `model` as it was, for a file that is damaged, foreign, or of another model, and
    `OSError` for one that cannot be read.

    >>> import tempfile, torch, offpath
    >>> model = nn.Sequential(offpath.SparseLinear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     offpath.save(model, f"{folder}/model.safetensors")
    ...     dense = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    ...     again = offpath.load(folder, dense)
    >>> again is dense, again[0]
    (True, SparseLinear(in_features=64, out_features=32, bias=True, nnz=205, sparsity=0.8999))
    """
    path = Path(path)
    if model is not None and not isinstance(model, nn.Module):
        raise StorageError(f"expected a model to load into, got a {type(model).__name__}")
    if path.is_dir():
        path = path / FILE_IN_FOLDER
    if path.exists() and not path.is_file():
        raise StorageError(f"{path}: expected a file")
    with said_of(path):
        contents = read(path)
        built = build(contents).eval() if model is None else model
        fit(built, contents)
    return built
