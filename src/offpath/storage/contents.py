"""What lies in a file, checked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from offpath.storage.columns import ENCODINGS, decode
from offpath.storage.digest import digest
from offpath.storage.errors import StorageError
from offpath.storage.header import FORMAT, Header
from offpath.storage.layers import LAYERS

# What is open has a path here, whatever becomes of the file's own name.
_OPEN_FILES = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"


@dataclass(frozen=True)
class Contents:
    """The sparse layers, whole, and all other tensors by key; what is mapped from the file is private to the reader."""

    header: Header
    layers: dict[str, nn.Module]
    tensors: dict[str, Tensor]


def read(path: Path) -> Contents:
    """Map the file, check it, and make its sparse layers.

    Takes memory in proportion to the file. Raises `StorageError` for one that is not whole.
    """
    text, tensors = _mapped(path)
    header = Header.from_text(text)
    layers = {}
    for name, entry in header.layers.items():
        prefix = f"{name}." if name else ""
        own = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        with said_of(f"layer {name!r}"):
            row = LAYERS[entry.kind]
            shape = row.pattern_shape(entry.arguments)
            missing = [key for key in ENCODINGS[entry.encoding] if key not in own]
            if missing:
                raise StorageError(f"expected {', '.join(missing)}, but it is not there")
            encoded = {key: own.pop(key) for key in ENCODINGS[entry.encoding]}
            if (shape is None) != (entry.encoding == "none"):
                raise StorageError(f"expected connections as a {entry.kind} has them, got {entry.encoding!r}")
            pattern = None if shape is None else decode(entry.encoding, encoded, shape, entry.nnz)
            layers[name] = row.build(entry.arguments, pattern, own)
    for kind, names, stored in (("shared", header.shared, layers), ("tied", header.tied, tensors)):
        for alias, name in names.items():
            if name not in stored or alias in stored:
                raise StorageError(f"expected {kind} names of what is stored, got {alias!r} for {name!r}")
    return Contents(header, layers, tensors)


@contextmanager
def said_of(what: object) -> Iterator[None]:
    """Put `what` in front of a `StorageError`."""
    try:
        yield
    except StorageError as error:
        raise StorageError(f"{what}: {error}") from error


# How other files begin that are found under such a name.
_FILE_KINDS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes one; torch.load reads it, offpath.load what offpath.save wrote",
    b"version https://git-lfs": "a pointer of git-lfs in place of the file; git lfs pull fetches it",
    b"<!doctype html": "a page, as a failed download leaves it; download the file itself",
}


def _what_it_is(path: Path, error: Exception) -> str:
    with path.open("rb") as opened:
        start = opened.read(64).lstrip()
    for magic, meaning in _FILE_KINDS.items():
        if start.lower().startswith(magic.lower()):
            return meaning
    return f"{error}; it is truncated, damaged or of another kind: restore it from a copy"


def _mapped(path: Path) -> tuple[str, dict[str, Tensor]]:
    try:
        # Opened here, because safetensors opens what it is given twice: another process may replace it in between.
        with path.open("rb") as opened, safe_open(f"{_OPEN_FILES}/{opened.fileno()}", framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise StorageError(f"expected a whole safetensors file, got {_what_it_is(path, error)}") from error
    if FORMAT not in metadata and any(key.endswith("col_indices") for key in tensors):
        raise StorageError(
            "expected a file that offpath.save wrote, got the state_dict of a sparse model; build a dense one, "
            "make it sparse by offpath.sparsify(model, filter_fn=lambda module, name: name + '.values' in tensors), "
            "and use model.load_state_dict(tensors); offpath.save spares you that"
        )
    if FORMAT not in metadata:
        raise StorageError(
            f"expected a file that offpath.save wrote, got {len(tensors)} plain tensors; load them with "
            "model.load_state_dict(safetensors.torch.load_file(path)), then make the model sparse"
        )
    if (metadata.get("format"), metadata.get("sha256")) != ("pt", digest(metadata[FORMAT], tensors)):
        raise StorageError("expected contents that agree with their checksum; the file is damaged: restore it")
    return metadata[FORMAT], tensors
