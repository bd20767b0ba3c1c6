"""Which layers a file can hold besides plain tensors: one row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from offpath.nn import SparseLinear, SparseSparseLinear
from offpath.pattern import Pattern
from offpath.storage.errors import StorageError

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Layer:
    """How layers of one class are stored.

    `sizes` and `options` are arguments of its constructor that it keeps as attributes of the same name; whatever
    stands in the model for it must agree in the sizes. `shape` is what the sizes say of its pattern, `replaces` are
    the dense classes whose place it takes. Its constructor also takes `bias`, `pattern` and `device`, and its
    `state_dict` names the two index tensors as `index_names` of the class does.
    """

    kind: Any
    sizes: tuple[str, ...]
    options: tuple[str, ...]
    shape: Callable[[Arguments], tuple[int, int]]
    replaces: tuple[type[nn.Module], ...]

    def arguments(self, layer: nn.Module) -> dict[str, Any]:
        """What the constructor was given, as JSON has it."""
        return {name: _listed(getattr(layer, name)) for name in (*self.sizes, *self.options)}

    def pattern_shape(self, arguments: Arguments) -> tuple[int, int]:
        """Rows and columns of the pattern. Raises `StorageError` for arguments that are not those of this class."""
        names = {*self.sizes, *self.options}
        if arguments.keys() != names:
            raise StorageError(f"expected arguments {sorted(names)}, got {sorted(arguments)}")
        try:
            rows, columns = self.shape(arguments)
        except (TypeError, ZeroDivisionError) as error:
            raise StorageError(f"expected sizes of a {self.kind.__name__}, got {error}") from error
        for size in (rows, columns):
            if type(size) is not int or not 0 <= size < 2**31:
                raise StorageError(f"expected sizes in [0, 2^31), got a pattern of {rows} x {columns}")
        return rows, columns

    def build(self, arguments: Arguments, pattern: Pattern, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The layer of these connections whose numbers are `tensors`, not copies; raises `StorageError`."""
        # Built on meta, so that nothing is drawn and nothing allocated before it is known that all fits.
        nowhere = Pattern(pattern.shape, pattern.crow_indices.to("meta"), pattern.col_indices.to("meta"))
        indices = dict(zip(self.kind.index_names, (pattern.crow_indices, pattern.col_indices), strict=True))
        try:
            given = {name: _tupled(value) for name, value in arguments.items()}
            layer: nn.Module = self.kind(**given, bias="bias" in tensors, pattern=nowhere, device="meta")
            layer.load_state_dict({**tensors, **indices}, assign=True)
        except (TypeError, ValueError, RuntimeError) as error:
            raise StorageError(f"expected what makes a {self.kind.__name__}, got: {error}") from error
        return layer

    def mismatch(self, arguments: Arguments, module: nn.Module) -> str | None:
        """Why a layer of these arguments cannot take the place of `module`; None if it can."""
        if type(module) is self.kind or type(module) in self.replaces:
            found = {name: _listed(getattr(module, name)) for name in self.sizes}
        elif type(module).__name__ == "Conv1D" and nn.Linear in self.replaces:  # that of Hugging Face, not imported
            weight = module.get_parameter("weight")
            found = {"in_features": weight.shape[0], "out_features": weight.shape[1]}
        else:
            return f"a {type(module).__name__}, which a {self.kind.__name__} cannot replace"
        expected = {name: arguments[name] for name in self.sizes}
        return None if found == expected else f"{_sizes(found)} in the model, {_sizes(expected)} in the file"


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _sizes(sizes: Arguments) -> str:
    return ", ".join(f"{name}={value}" for name, value in sizes.items())


LAYERS: dict[str, Layer] = {
    row.kind.__name__: row
    for row in (
        Layer(
            SparseLinear,
            sizes=("in_features", "out_features"),
            options=("prefer",),
            shape=lambda sizes: (sizes["out_features"], sizes["in_features"]),
            replaces=(nn.Linear,),
        ),
        Layer(
            SparseSparseLinear,
            sizes=("in_features", "out_features"),
            options=(),
            shape=lambda sizes: (sizes["in_features"], sizes["out_features"]),
            replaces=(nn.Linear, SparseLinear),
        ),
    )
}
