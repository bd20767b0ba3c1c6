"""What a file says of itself in JSON: which of its tensors make a sparse layer, which are tied, which model it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from offpath.storage.columns import ENCODINGS
from offpath.storage.errors import StorageError
from offpath.storage.layers import LAYERS

FORMAT = "offpath"  # also the key of the metadata under which the JSON stands
VERSION = 1
# Parsed JSON takes some twenty times the bytes of its text.
MAX_BYTES = 2**24
INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class LayerEntry:
    """A sparse layer: its class, what its constructor was given, and how its connections are written."""

    kind: str
    arguments: dict[str, Any]
    nnz: int
    encoding: str


@dataclass(frozen=True)
class Header:
    """`layers` by their names; `shared` and `tied`: other names of a layer, of a tensor; `model`: the architecture."""

    layers: dict[str, LayerEntry] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    model: dict[str, Any] | None = None

    def to_text(self) -> str:
        """The JSON. Raises `StorageError` if it were longer than a reader takes."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, allow_nan=False)
        if len(text.encode()) > MAX_BYTES:
            raise StorageError(f"expected a description of at most {MAX_BYTES} bytes, got {len(text.encode())}")
        return text

    @classmethod
    def from_text(cls, text: str) -> Header:
        """The header that `to_text` wrote. Raises `StorageError` for anything else."""
        if len(text.encode()) > MAX_BYTES:
            raise StorageError(f"expected a header of at most {MAX_BYTES} bytes, got {len(text.encode())}")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise StorageError(f"expected a header in JSON, got: {error}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise StorageError("expected the header of an offpath file, got other JSON")
        if found.get("version") != VERSION:
            raise StorageError(
                f"expected version {VERSION} of the format, got {found.get('version')!r}; update offpath to load it"
            )
        _check_names("the header", found, {"format", "version", "layers", "shared", "tied", "model"})
        layers = _mapping("layers", found["layers"], lambda value: isinstance(value, dict))
        names = {key: _mapping(key, found[key], lambda value: isinstance(value, str)) for key in ("shared", "tied")}
        if found["model"] is not None and not isinstance(found["model"], dict):
            raise StorageError(f"expected model to be an object or null, got {type(found['model']).__name__}")
        return cls({name: _entry(name, value) for name, value in layers.items()}, **names, model=found["model"])


def _entry(name: str, found: Mapping[str, Any]) -> LayerEntry:
    _check_names(f"layer {name!r}", found, set(LayerEntry.__dataclass_fields__))
    kind, encoding, nnz = found["kind"], found["encoding"], found["nnz"]
    for what, value, known in (("class", kind, LAYERS), ("encoding", encoding, ENCODINGS)):
        if not isinstance(value, str) or value not in known:
            raise StorageError(
                f"expected {what} {' or '.join(known)} for layer {name!r}, got {value!r:.60}; update offpath to load it"
            )
    if type(nnz) is not int or not 0 <= nnz <= INT32_MAX:
        raise StorageError(f"expected nnz in [0, 2^31) for layer {name!r}, got {nnz!r:.60}")
    arguments = _mapping(f"the arguments of layer {name!r}", found["arguments"], _is_argument)
    return LayerEntry(kind, arguments, nnz, encoding)


def _is_argument(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 8 and all(type(entry) is int and _is_argument(entry) for entry in value)
    return value is None or isinstance(value, (bool, str)) or (type(value) is int and abs(value) <= INT32_MAX)


def _mapping(what: str, found: Any, fits: Callable[[Any], bool]) -> dict[str, Any]:
    if not isinstance(found, dict) or not all(map(fits, found.values())):
        raise StorageError(f"expected {what} to be an object of the kind that offpath writes, got {found!r:.60}")
    return found


def _check_names(what: str, found: Mapping[str, Any], names: set[str]) -> None:
    if found.keys() != names:
        raise StorageError(f"expected {what} to hold {sorted(names)}, got {sorted(found)!r:.200}")
