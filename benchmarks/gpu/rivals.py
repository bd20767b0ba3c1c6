"""What others have for the same products."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.sparse import to_sparse_semi_structured

from contenders import Refused


@cache
def sparsify_kernels() -> ModuleType:
    """The Triton kernels of eai-sparsify, without the rest of it: a trainer that needs ten more packages.

    Raises `Refused` where it is not installed.
    """
    found = importlib.util.find_spec("sparsify")
    folders = list(found.submodule_search_locations or ()) if found else []
    files = [file for folder in folders if (file := Path(folder) / "xformers.py").exists()]
    if not files:
        raise Refused("eai-sparsify is not installed; to compare with it: pip install --no-deps eai-sparsify")
    spec = importlib.util.spec_from_file_location("eai_sparsify_kernels", files[0])
    if spec is None or spec.loader is None:
        raise Refused(f"{files[0]} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sparsify_version() -> str | None:
    try:
        return version("eai-sparsify")
    except PackageNotFoundError:
        return None


def two_of_four(weight: Tensor) -> Tensor:
    """The larger two of every four weights as torch's 2:4 format; raises `Refused` where torch cannot make it."""
    fours = weight.view(-1, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, fours.abs().topk(2, dim=1).indices, True)
    return _refusing("torch's 2:4 format", lambda: to_sparse_semi_structured((fours * kept).view_as(weight)))


def csr(crow_indices: Tensor, col_indices: Tensor, values: Tensor, columns: int) -> Tensor:
    """torch's CSR matrix; raises `Refused` where torch cannot make it."""
    shape = crow_indices.numel() - 1, columns
    return _refusing("torch.sparse", lambda: torch.sparse_csr_tensor(crow_indices, col_indices, values, shape))


def _refusing(name: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except RuntimeError as error:
        raise Refused(f"{name} does not do this here: {str(error).splitlines()[0]}") from error
