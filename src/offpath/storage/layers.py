"""Which layers a file can hold besides plain tensors: one row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offpath.nn import Int8Embedding, Int8SparseLinear, SparseConv1d, SparseConv2d, SparseLinear, SparseSparseLinear
from offpath.pattern import Pattern
from offpath.storage.errors import StorageError

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Layer:
    """How layers of one class are stored.

    `sizes` and `options` are arguments of its constructor that it keeps as attributes of the same name; whatever
    stands in the model for it must agree in the sizes. `replaces` are the classes whose place it can take. `shape` is
    what the sizes say of its pattern: the constructor of such a layer also takes `bias` and `pattern`, and its
    `state_dict` names the two index tensors as `index_names` of the class does. None stands for a layer without one.
    """

    kind: Any
    sizes: tuple[str, ...]
    options: tuple[str, ...]
    replaces: tuple[type[nn.Module], ...]
    shape: Callable[[Arguments], tuple[int, int]] | None = None

    def arguments(self, layer: nn.Module) -> dict[str, Any]:
        """What the constructor was given, as JSON has it."""
        return {name: as_json(getattr(layer, name)) for name in (*self.sizes, *self.options)}

    def pattern_shape(self, arguments: Arguments) -> tuple[int, int] | None:
        """Rows and columns of the pattern. Raises `StorageError` for arguments that are not those of this class."""
        names = {*self.sizes, *self.options}
        if arguments.keys() != names:
            raise StorageError(f"expected arguments {sorted(names)}, got {sorted(arguments)}")
        if self.shape is None:
            return None
        try:
            rows, columns = self.shape(arguments)
        except (TypeError, ZeroDivisionError) as error:
            raise StorageError(f"expected sizes of a {self.kind.__name__}, got {error}") from error
        for size in (rows, columns):
            if type(size) is not int or not 0 <= size < 2**31:
                raise StorageError(f"expected sizes in [0, 2^31), got a pattern of {rows} x {columns}")
        return rows, columns

    def build(self, arguments: Arguments, pattern: Pattern | None, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The layer of these connections whose numbers are `tensors`, not copies; raises `StorageError`."""
        of_pattern: dict[str, Any] = {}
        indices: dict[str, Tensor] = {}
        if pattern is not None:
            nowhere = Pattern(pattern.shape, pattern.crow_indices.to("meta"), pattern.col_indices.to("meta"))
            of_pattern = {"bias": "bias" in tensors, "pattern": nowhere}
            indices = dict(zip(self.kind.index_names, (pattern.crow_indices, pattern.col_indices), strict=True))
        try:
            given = {name: _revived(name, value) for name, value in arguments.items()}
            # Built on meta, so that nothing is drawn and nothing allocated before it is known that all fits.
            layer: nn.Module = self.kind(**given, **of_pattern, device="meta")
            dtypes = {
                name: tensor.dtype for name, tensor in layer.state_dict().items() if not tensor.is_floating_point()
            }
            for name, tensor in tensors.items():
                if tensor.dtype != dtypes.get(name, tensor.dtype) or tensor.is_floating_point() == (name in dtypes):
                    raise StorageError(
                        f"expected {dtypes.get(name, 'floating point')} for {name!r}, got {tensor.dtype}"
                    )
            layer.load_state_dict({**tensors, **indices}, assign=True)
        except (TypeError, ValueError, RuntimeError) as error:
            raise StorageError(f"expected what makes a {self.kind.__name__}, got: {error}") from error
        return layer

    def mismatch(self, arguments: Arguments, module: nn.Module) -> str | None:
        """Why a layer of these arguments cannot take the place of `module`; None if it can."""
        if type(module) is self.kind or type(module) in self.replaces:
            found = {name: as_json(getattr(module, name)) for name in self.sizes}
        elif type(module).__name__ == "Conv1D" and nn.Linear in self.replaces:  # that of Hugging Face, not imported
            weight = module.get_parameter("weight")
            found = {"in_features": weight.shape[0], "out_features": weight.shape[1]}
        else:
            return f"a {type(module).__name__}, which a {self.kind.__name__} cannot replace"
        expected = {name: arguments[name] for name in self.sizes}
        return None if found == expected else f"{_sizes(found)} in the model, {_sizes(expected)} in the file"


def as_json(value: Any) -> Any:
    """An argument as JSON has it: a dtype by its name, a tuple as a list, a number of NumPy as one of Python."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, np.generic):
        return value.item()
    return [as_json(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def _revived(name: str, value: Any) -> Any:
    if name == "dtype":
        dtype = getattr(torch, value, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"expected the name of a floating point dtype, got {value!r:.60}")
        return dtype
    return tuple(value) if isinstance(value, list) else value


def _sizes(sizes: Arguments) -> str:
    return ", ".join(f"{name}={value}" for name, value in sizes.items())


def _out_by_in(sizes: Arguments) -> tuple[int, int]:
    return sizes["out_features"], sizes["in_features"]


def _channels_by_kernels(sizes: Arguments) -> tuple[int, int]:
    return sizes["out_channels"], sizes["in_channels"] // sizes["groups"] * prod(sizes["kernel_size"])


_LINEAR = ("in_features", "out_features")
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
LAYERS: dict[str, Layer] = {
    row.kind.__name__: row
    for row in (
        Layer(SparseLinear, _LINEAR, ("prefer",), (nn.Linear,), _out_by_in),
        Layer(SparseSparseLinear, _LINEAR, (), (nn.Linear, SparseLinear), lambda sizes: _out_by_in(sizes)[::-1]),
        Layer(SparseConv1d, _CONV, ("prefer",), (nn.Conv1d,), _channels_by_kernels),
        Layer(SparseConv2d, _CONV, ("prefer",), (nn.Conv2d,), _channels_by_kernels),
        Layer(Int8SparseLinear, _LINEAR, ("prefer", "activations"), (nn.Linear, SparseLinear), _out_by_in),
        Layer(Int8Embedding, ("num_embeddings", "embedding_dim", "padding_idx"), ("dtype",), (nn.Embedding,)),
    )
}
