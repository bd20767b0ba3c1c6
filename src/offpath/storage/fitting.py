"""Putting what a file holds into a model: all of it, or nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offpath.convert.swap import attachment, swap_modules
from offpath.nn.sparse_weight import SparseWeightModule
from offpath.storage.contents import Contents
from offpath.storage.errors import StorageError
from offpath.storage.layers import LAYERS


def fit(model: nn.Module, contents: Contents) -> None:
    """Put the sparse layers of `contents` in the places of those of the same names, and all tensors into the rest.

    Nothing is copied: tensors become the parameters and buffers, with the dtypes that they have. Raises `StorageError`
    for a model of other names or sizes, which is then unchanged.
    """
    root = contents.layers.get("")
    if root is not None:
        _fit_root(model, root, contents)
        return
    replacements = _replacements(model, contents)
    with _unchanged_on_error(model):
        swap_modules(model, replacements)
        state = _state(model, contents)
        try:
            result = model.load_state_dict(state, strict=False, assign=True)
        except RuntimeError as error:
            raise StorageError(f"expected tensors that fit the model, got: {error}") from error
        prefixes = tuple(f"{name}." for name in (*contents.layers, *contents.header.shared))
        missing = [key for key in result.missing_keys if not key.startswith(prefixes)]
        _check_same(missing, result.unexpected_keys)


def _check_same(of_model: list[str], of_file: list[str]) -> None:
    """Raise `StorageError` for names that only one of the two has."""
    if not of_model and not of_file:
        return
    told = [
        f"only {owner} has {', '.join(map(repr, names[:8]))}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for owner, names in (("the model", of_model), ("the file", of_file))
        if names
    ]
    step = ""
    if any(name.endswith(("_orig", "_mask")) for name in of_file):
        step = "; make masks permanent before saving, with torch.nn.utils.prune.remove(module, name)"
    raise StorageError(f"expected the same names, but {', and '.join(told)}{step}")


def _fit_root(model: nn.Module, root: nn.Module, contents: Contents) -> None:
    """The file is a single layer: nothing can take the place of `model` itself, so it must be of that class already."""
    entry = contents.header.layers[""]
    problem = LAYERS[entry.kind].mismatch(entry.arguments, model)
    if problem is None and type(model) is not type(root):
        problem = f"a {type(model).__name__}, which cannot replace itself; leave model= out"
    if problem:
        raise StorageError(f"expected a {entry.kind} like the one in the file, got {problem}")
    if model is not root:
        with _unchanged_on_error(model):
            model.load_state_dict(root.state_dict(), assign=True)


def _replacements(model: nn.Module, contents: Contents) -> dict[nn.Module, nn.Module]:
    found: dict[nn.Module, nn.Module] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    shared = contents.header.shared
    for name, first in {**{name: name for name in contents.layers}, **shared}.items():
        module, entry, layer = modules.get(name), contents.header.layers[first], contents.layers[first]
        if module is None or module is model:
            packed = isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)
            step = "; call offpath.unpack_attention(model) before, as it was for the file" if packed else ""
            raise StorageError(f"expected a module {name!r} in the model, where the file has a {entry.kind}{step}")
        problem = LAYERS[entry.kind].mismatch(entry.arguments, module)
        has_bias = [getattr(one, "bias", None) is not None for one in (module, layer)]
        if problem is None and has_bias[0] != has_bias[1]:
            problem = f"bias={has_bias[0]} in the model, bias={has_bias[1]} in the file"
        if problem is None and found.setdefault(module, layer) is not layer:
            problem = "one module of two names in the model, two in the file"
        if problem:
            raise StorageError(f"expected layer {name!r} to take the place of one of its size, got {problem}")
        attached = attachment(module, Counter())
        if attached:
            raise StorageError(
                f"expected layer {name!r} to take the place of one that nothing hangs on, but {attached}; load into a "
                "model as its code builds it, and attach that afterwards"
            )
    if len(found) != len(contents.layers):
        raise StorageError(f"expected a model that shares modules as the file does: {', '.join(map(repr, shared))}")
    for name, module in modules.items():
        if isinstance(module, SparseWeightModule) and module not in found:
            raise StorageError(f"expected a sparse layer {name!r} in the file, as in the model, but there is none")
    for module, layer in found.items():
        layer.train(module.training)
        _like(module, layer)
    return found


def _like(module: nn.Module, layer: nn.Module) -> None:
    """Give the parameters of `layer` the device and the `requires_grad` of those whose place they take."""
    weight = next((p for name in ("weight", "values") if (p := getattr(module, name, None)) is not None), None)
    if weight is not None and not weight.is_meta:
        layer.to(weight.device)
    for name, like in (("values", weight), ("bias", module._parameters.get("bias"))):
        parameter = layer._parameters.get(name)
        if parameter is not None and like is not None:
            parameter.requires_grad_(like.requires_grad)


def _state(model: nn.Module, contents: Contents) -> dict[str, Tensor]:
    """All tensors by all of their names; a parameter of two names is one object, or torch would make it two."""
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
    state: dict[str, Tensor] = {}
    made: dict[str, nn.Parameter] = {}
    source = {**{key: key for key in contents.tensors}, **contents.header.tied}
    for key, stored in _as_tied(parameters, source, contents.tensors).items():
        tensor, own = contents.tensors[stored], parameters.get(key)
        if own is None:
            state[key] = tensor
            continue
        if own.is_floating_point() != tensor.is_floating_point():
            raise StorageError(f"expected {own.dtype} for {key!r}, got {tensor.dtype}")
        if stored not in made:
            moved = tensor if own.is_meta else tensor.to(own.device)
            made[stored] = nn.Parameter(moved, requires_grad=own.requires_grad)
        state[key] = made[stored]
    return state


def _as_tied(
    parameters: Mapping[str, nn.Parameter], source: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """`source`, each name's own in the file, with one for all names of a parameter that the model has tied."""
    first_of: dict[int, str] = {}
    found = dict(source)
    for key in source:
        if key in parameters:
            first = first_of.setdefault(id(parameters[key]), key)
            if found[key] != found[first] and not _equal(tensors[found[key]], tensors[found[first]]):
                raise StorageError(
                    f"expected one tensor for {first!r} and {key!r}, which the model has tied, but they differ in the "
                    "file; load into a model that does not tie them"
                )
            found[key] = found[first]
    return found


def _equal(tensor: Tensor, other: Tensor) -> bool:
    return tensor.dtype is other.dtype and torch.equal(tensor, other)


@contextmanager
def _unchanged_on_error(model: nn.Module) -> Iterator[None]:
    before: list[tuple[nn.Module, dict[str, Any]]] = [
        (module, {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()})
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, attributes in before:
            for key in vars(module).keys() - attributes.keys():
                delattr(module, key)
            for key, value in attributes.items():
                if isinstance(value, dict):  # the same object as before: others may hold it
                    vars(module)[key].clear()
                    vars(module)[key].update(value)
                else:
                    vars(module)[key] = value
        raise
