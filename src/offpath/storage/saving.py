"""Model -> file."""

from __future__ import annotations

import os
import stat
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from offpath.nn.sparse_weight import SparseWeightModule
from offpath.storage.architecture import describe
from offpath.storage.columns import encode
from offpath.storage.contents import said_of
from offpath.storage.digest import digest
from offpath.storage.errors import StorageError
from offpath.storage.files import write_whole
from offpath.storage.header import FORMAT, Header, LayerEntry
from offpath.storage.layers import LAYERS

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_OF_LAYERS = {"values", "scales", "bias"}
_METADATA = "__metadata__"


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write `model` to one safetensors file that holds of each sparse layer only the connections that exist.

    The keys are those of the `state_dict`; connections take one bit for every position or two bytes each, whichever is
    less (docs/format.md). A tensor that is tied is stored once. Models of `transformers`, and `nn.Sequential` of layers
    that offpath knows, are described, so that `load` needs no `model`. The file is written beside `path` and renamed.
    Raises `StorageError`, with the name of what is in the way, for what cannot be stored, and `OSError` if the file
    cannot be written; then an older file is as it was.

    >>> import tempfile, offpath
    >>> model = nn.Sequential(offpath.SparseLinear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     offpath.save(model, f"{folder}/model.safetensors")
    ...     again = offpath.load(f"{folder}/model.safetensors")
    >>> x = torch.randn(8, 64)
    >>> torch.equal(again(x), model(x))
    True
    """
    path = Path(path)
    if not isinstance(model, nn.Module):
        raise StorageError(f"expected a model to save, got a {type(model).__name__}")
    _check_place(path)
    layers, shared = _sparse_layers(model)
    tensors = _tensors(model, [*layers, *shared])
    entries: dict[str, LayerEntry] = {}
    of_layers: dict[str, Tensor] = {}
    for name, layer in layers.items():
        with said_of(f"layer {name!r}"):
            entries[name], own = _stored(layer)
        of_layers |= {f"{name}.{key}" if name else key: tensor for key, tensor in own.items()}
    tensors |= of_layers
    tied = _tied(tensors)
    for alias, key in tied.items():
        if alias in of_layers or key in of_layers:
            raise StorageError(f"expected sparse layers with numbers of their own, but {alias!r} is tied to {key!r}")
    if _METADATA in tensors:
        raise StorageError(f"expected tensors with other names than {_METADATA}, under which safetensors keeps its own")
    contiguous = {key: _written_out(tensor) for key, tensor in tensors.items() if key not in tied}
    text = Header(entries, shared, tied, describe(model)).to_text()
    metadata = {"format": "pt", FORMAT: text, "sha256": digest(text, contiguous)}
    try:
        write_whole(path, lambda beside: _write(contiguous, beside, metadata))
    except OSError as error:  # which names the file beside, if any
        room = "" if isinstance(error, PermissionError) else "free space or "
        told = type(error)(f"expected to write {path}, got: {error.strerror or error}; {room}choose another place")
        told.errno = error.errno
        raise told from error


def _check_place(path: Path) -> None:
    """Raise `StorageError` for what a file must not replace, and `OSError` where there can be none."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.resolve().parent.is_dir():
            raise FileNotFoundError(
                f"expected a folder to write {path.name} into, got {path.parent}; make it"
            ) from None
        return
    if stat.S_ISDIR(mode):
        raise StorageError(f"expected the name of a file, got the folder {path}; try {path / 'model.safetensors'}")
    if not stat.S_ISREG(mode):
        raise StorageError(f"expected the name of a file, got {path}, which is a device, a pipe or a socket")


def _written_out(tensor: Tensor) -> Tensor:
    """Its numbers as the CPU has them in memory, one behind the other."""
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _sparse_layers(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """The layers that are stored by a row of the table, by their first names, and their other names."""
    first: dict[nn.Module, str] = {}
    shared = {}
    for name, module in model.named_modules(remove_duplicate=False):
        row = LAYERS.get(type(module).__name__)
        if row is None or row.kind is not type(module):
            if isinstance(module, SparseWeightModule):
                raise StorageError(
                    f"expected layers that offpath knows how to store ({', '.join(LAYERS)}), but {name!r} is a "
                    f"{type(module).__name__}; remove parametrizations, or keep the state_dict with torch.save"
                )
        elif module in first:
            shared[name] = first[module]
        else:
            first[module] = name
    return {name: module for module, name in first.items()}, shared


def _tensors(model: nn.Module, without: list[str]) -> dict[str, Tensor]:
    """The `state_dict`, itself and not copied, without some modules. Raises `StorageError` for what is no tensor."""
    prefixes = tuple(f"{name}." if name else "" for name in without)
    state = {key: value for key, value in model.state_dict(keep_vars=True).items() if not key.startswith(prefixes)}
    for key, value in state.items():
        if type(value) not in _PLAIN or value.layout != torch.strided or value.is_quantized:
            raise StorageError(f"expected plain tensors in the state_dict, got a {type(value).__name__} as {key!r}")
        if value.is_meta:
            raise StorageError(f"expected tensors with data, but {key!r} is on the meta device; load the weights first")
    return state


def _stored(layer: Any) -> tuple[LayerEntry, dict[str, Tensor]]:
    row = LAYERS[type(layer).__name__]
    kind, own = row.kind.__name__, _tensors(layer, [])
    if row.shape is not None:
        own = {key: tensor for key, tensor in own.items() if key not in row.kind.index_names}
        if "values" not in own:
            raise StorageError("expected values of its own, but they are computed by a mask; remove that first")
    added = sorted(own.keys() - _OF_LAYERS)
    if added:
        raise StorageError(f"expected no tensors but those of a {kind}, got {', '.join(added)}; hold them elsewhere")
    if row.shape is None:
        return LayerEntry(kind, row.arguments(layer), 0, "none"), own
    pattern = layer.pattern
    encoding, encoded = encode(pattern)
    return LayerEntry(kind, row.arguments(layer), pattern.nnz, encoding), own | encoded


def _tied(tensors: dict[str, Tensor]) -> dict[str, str]:
    """The names of tensors that are the same memory as an earlier one, and the name of that one.

    Raises `StorageError` for those that share a part of their memory: written one by one, they would come back as two.
    """
    names: dict[tuple, str] = {}
    tied = {}
    spans: dict[int, list[tuple[int, int, str]]] = {}
    for key, tensor in tensors.items():
        if not tensor.numel():
            continue
        start = tensor.data_ptr()
        first = names.setdefault((tensor.device, start, tensor.dtype, tensor.shape, tensor.stride()), key)
        if first != key:
            tied[key] = first
            continue
        entries = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        span = start, start + entries * tensor.element_size(), key
        spans.setdefault(tensor.untyped_storage()._cdata, []).append(span)
    for of_storage in spans.values():
        for (_, end, key), (start, _, other) in pairwise(sorted(of_storage)):
            if start < end:
                raise StorageError(f"expected tensors that are the same or apart, but {key!r} and {other!r} overlap")
    return tied


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata)
    except KeyError as error:
        raise StorageError(f"expected dtypes that safetensors can hold, got {error}; convert those tensors") from error
    except SafetensorError as error:
        raise OSError(str(error)) from error
