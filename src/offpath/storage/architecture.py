"""Which model a file holds, where that can be said without naming code to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from offpath.storage import hugging_face, sequential
from offpath.storage.contents import Contents
from offpath.storage.errors import StorageError

# Kind: its description as JSON (None for models of another kind), and the model that a description stands for, once for
# every try: its parameters may be on the meta device, all else is as the constructors leave it.
KINDS: dict[str, tuple[Callable[[nn.Module], dict | None], Callable[[Mapping[str, Any], Contents], nn.Module]]] = {
    "transformers": (hugging_face.describe, hugging_face.build),
    "sequential": (sequential.describe, sequential.build),
}


def describe(model: nn.Module) -> dict[str, Any] | None:
    """What `build` makes the architecture of `model` from, or None for one that only its own code can build."""
    found = {kind: description for kind, (describe_, _) in KINDS.items() if (description := describe_(model))}
    return found or None


def build(contents: Contents) -> nn.Module:
    """The architecture that the header describes, without the numbers. Raises `StorageError`."""
    description = contents.header.model
    if description is None:
        raise StorageError(
            "expected a model to load into, since the file does not say how its own is built (classes of other "
            "packages, hooks and changed modules are no part of it); pass model="
        )
    if len(description) != 1 or not all(isinstance(value, dict) for value in description.values()):
        raise StorageError(f"expected one description of a model, got {sorted(description)}")
    ((kind, found),) = description.items()
    if kind not in KINDS:
        raise StorageError(
            f"expected a model of {' or '.join(KINDS)}, got {kind!r:.60}; pass model=, or update offpath"
        )
    return KINDS[kind][1](found, contents)
