"""What layers with a sparse weight share: connections that only they can change, and their way into a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from offpath import pattern as patterns
from offpath.nn.casts import keep_dtypes
from offpath.nn.connected_module import ConnectedModule
from offpath.nn.density import density_of
from offpath.nn.loading import load_problem, sources_of_values
from offpath.nn.parameter import replace_values
from offpath.ops import Connections
from offpath.pattern import Pattern

_Layer = TypeVar("_Layer", bound="SparseWeightModule")


class SparseWeightModule(ConnectedModule):
    """The weight of a linear layer as `values` [nnz] over a pattern, with a bias."""

    sides: ClassVar[tuple[str, str]]  # "out" and "in": what the rows and the columns of the pattern are
    index_names: ClassVar[tuple[str, str]]  # of the row pointer and the column indices, in the state_dict
    from_dense_by: ClassVar[str]  # what makes one of a dense layer, for messages
    value_names: ClassVar[tuple[str, ...]] = ("values",)  # what in the state_dict belongs to the topology beside
    values: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        sparsity: float | None,
        density: float | None,
        pattern: Pattern | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        if in_features < 0 or out_features < 0:
            raise ValueError(
                f"expected sizes of at least 0, got in_features={in_features}, out_features={out_features}"
            )
        self.in_features = in_features
        self.out_features = out_features
        device = torch.get_default_device() if device is None else device
        shape = self.pattern_shape
        if (sparsity is not None) + (density is not None) + (pattern is not None) > 1:
            raise ValueError("expected one of sparsity=, density= and pattern=, got several")
        if pattern is None:
            nnz = round(density_of(sparsity, density) * out_features * in_features)
            pattern = patterns.random(shape, nnz, generator, device)
        else:
            patterns.expect(pattern, shape, f"({', '.join(self.sides)}) = ")
        self._set_connections(Connections(pattern.to(device)))
        self.values = nn.Parameter(torch.empty(pattern.nnz, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw values and bias from U(-1/sqrt(k), 1/sqrt(k)), with k the live fan-in of the output.

        This is `nn.Linear`'s rule with the number of inputs that a unit really has (Evci et al., "Gradient Flow in
        Sparse Neural Networks and How Lottery Tickets Win", 2020). A unit without connections gets bias zero.
        """
        if self.values.is_meta:
            return
        self._check_there()
        self.topology_digest.fill_(self._digest)  # what to_empty() leaves there is no digest
        pattern = self.pattern
        outputs = (pattern.row_indices() if self.sides[0].startswith("out") else pattern.col_indices).long()
        fan_in = torch.bincount(outputs, minlength=self.out_features).double()
        bound = torch.where(fan_in > 0, fan_in.rsqrt(), 0.0)
        per_slot = bound[outputs]
        for parameter, scale in ((self.values, per_slot), (self.bias, bound)):
            if parameter is not None:
                # Drawn on the CPU so that a seed gives the same numbers on every device.
                draw = torch.rand(parameter.shape, generator=generator, dtype=torch.float64, device="cpu") * 2 - 1
                parameter.copy_(draw.to(parameter.device) * scale)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name != "weight":
                raise
            raise AttributeError(
                f"a {type(self).__name__} has `values` and no `weight`, which the code around it reads. Leave this "
                "layer dense (filter_fn of sparsify and compress), or make it so again with .to_dense(). An "
                "nn.TransformerEncoder calls it instead after offpath.convert.fuse_only_dense_encoders(model)"
            ) from error

    @property
    def pattern(self) -> Pattern:
        """The connections, as a frozen `Pattern`: a copy, made and checked in every call."""
        return self._connections.pattern

    @property
    def connections(self) -> Connections:
        """The topology as the ops take it, for those who call them themselves; not to be written into."""
        if torch.compiler.is_compiling():
            self._keep_columns()
        else:
            self._connections.hand_out()
        return self._connections

    def _copy_of_columns(self) -> Tensor:
        if torch.compiler.is_compiling():
            return self.connections.col_indices.clone()
        return self._connections.copy_of_columns()

    @property
    def nnz(self) -> int:
        """Number of connections."""
        return self.values.numel()

    @property
    def sparsity(self) -> float:
        """Share of the dense weight's entries that are not stored."""
        positions = self.in_features * self.out_features
        return 1 - self.nnz / positions if positions else 1.0

    @property
    def density(self) -> float:
        """1 - sparsity."""
        return 1 - self.sparsity

    @property
    def pattern_shape(self) -> tuple[int, int]:
        """The sizes of `sides`."""
        by_output = self.sides[0].startswith("out")
        return (self.out_features, self.in_features) if by_output else (self.in_features, self.out_features)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of the weight of the dense layer that computes the same."""
        return self.out_features, self.in_features

    @property
    def owns_values(self) -> bool:
        """Whether `values` are this layer's: torch.nn.utils.prune or weight_norm may have taken them over."""
        return "values" in self._parameters or "values" in self._buffers

    @classmethod
    def _holding(cls: type[_Layer], pattern: Pattern, values: Tensor, requires_grad: bool, like: Any) -> _Layer:
        """A layer of the sizes, bias and mode of `like` with these connections and this memory as its values."""
        # Built on meta so that no initial values are drawn: converting a layer must not move the global RNG.
        sizes = like.in_features, like.out_features, like.bias is not None
        layer = cls(*sizes, "meta", values.dtype, density=1)  # type: ignore[call-arg]  # the layers have defaults
        return layer._hold(pattern, values, requires_grad, like)

    def _hold(self: _Layer, pattern: Pattern, values: Tensor, requires_grad: bool, like: Any) -> _Layer:
        """This layer, built on meta, with these connections and this memory as its values; bias and mode of `like`."""
        self._set_connections(Connections(pattern))
        self.values = nn.Parameter(values, requires_grad=requires_grad)
        if like.bias is not None:
            self.bias = nn.Parameter(like.bias.detach().clone(), requires_grad=like.bias.requires_grad)
        return self.train(like.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"nnz={self.nnz}, sparsity={self.sparsity:.4g}"
        )

    def _resize_values(self, nnz: int) -> None:
        replace_values(self.values, self.values.new_empty(nnz).detach())

    def _apply(self: _Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Layer:
        before = {"topology_digest": self.topology_digest}
        super()._apply(fn, recurse)
        keep_dtypes(self, before)
        if not self._connections.is_meta or self.values.is_meta:
            self._connections = self._connections.to(self.values.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._check_given_away()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.index_names:
            destination[prefix + name] = getattr(self, name)
        # A pattern also fits a wider layer. What torch keeps beside a state_dict, and saves with it, tells them apart.
        beside = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if beside is not None:
            beside["dense_shape"] = self.dense_shape

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take over the topology, whatever its nnz, before the default loading copies the numbers in.

        Nothing of this layer is touched when the checkpoint does not fit. An optimizer that holds `values` goes on
        holding it, but what it remembers has the old nnz: load the optimizer's state as well, or build a new one.
        """
        assign = local_metadata.get("assign_to_params_buffers", False)
        problem = load_problem(self, state_dict, prefix, assign, local_metadata.get("dense_shape"))
        if problem:
            error_msgs.append(f"{type(self).__name__} {prefix.rstrip('.') or '(root)'}: {problem}")
            return
        crow_indices, col_indices = (state_dict.get(prefix + name) for name in self.index_names)
        if crow_indices is None or col_indices is None:
            if strict:
                missing_keys += [prefix + name for name in self.index_names]
        elif self.owns_values or any(prefix + name in state_dict for name in sources_of_values(self)):
            device = col_indices.device if assign else self.values.device
            pattern = Pattern(self.pattern_shape, crow_indices.detach().to(device), col_indices.detach().to(device))
            self._set_connections(self._connections.same_or_new(pattern))
            if pattern.nnz != self.values.numel():
                self._resize_values(pattern.nnz)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in self.index_names:
            if prefix + name in unexpected_keys:  # torch knows parameters and buffers only
                unexpected_keys.remove(prefix + name)


class CsrWeightModule(SparseWeightModule):
    """A layer that stores its weight by output."""

    index_names = ("crow_indices", "col_indices")

    @property
    def crow_indices(self) -> Tensor:
        """Where each output's connections begin, int32 [number of outputs + 1]: a copy."""
        return self._connections.crow_indices.clone()

    @property
    def col_indices(self) -> Tensor:
        """The column of each connection, int32 [nnz]: a copy."""
        return self._copy_of_columns()
