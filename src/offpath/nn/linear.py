"""`SparseLinear`: `nn.Linear` with only the weights that exist."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from offpath import pattern as patterns
from offpath.ops import sparse_linear
from offpath.pattern import Pattern, PatternError

DEFAULT_SPARSITY = 0.9


class SparseLinear(nn.Module):
    """A linear layer that stores and computes only the connections of its pattern.

    Input [..., in_features], output [..., out_features], float32, float64 or bfloat16. Its parameters are `values`
    [nnz], in row-major order of the connections, and `bias` [out_features]; its buffers `crow_indices` and
    `col_indices` (int32) are the topology and travel with the `state_dict`.

    Give `sparsity` in [0, 1) (the default is 0.9) or `density` in (0, 1] for a random pattern of exactly
    round(density * out * in) connections, or a `pattern`. Raises `ValueError` for anything else.

    >>> import torch
    >>> layer = SparseLinear(784, 100, sparsity=0.9)
    >>> layer
    SparseLinear(in_features=784, out_features=100, bias=True, nnz=7840, sparsity=0.9)
    >>> layer(torch.randn(32, 784)).shape
    torch.Size([32, 100])
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    crow_indices: Tensor
    col_indices: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        sparsity: float | None = None,
        density: float | None = None,
        pattern: Pattern | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if in_features < 0 or out_features < 0:
            raise ValueError(
                f"expected sizes of at least 0, got in_features={in_features}, out_features={out_features}"
            )
        self.in_features = in_features
        self.out_features = out_features
        device = torch.get_default_device() if device is None else device
        shape = (out_features, in_features)
        if (sparsity is not None) + (density is not None) + (pattern is not None) > 1:
            raise ValueError("expected one of sparsity=, density= and pattern=, got several")
        if pattern is None:
            nnz = round(_density(sparsity, density) * out_features * in_features)
            pattern = patterns.random(shape, nnz, generator, device)
        elif pattern.shape != shape:
            raise ValueError(f"expected a pattern of shape (out, in) = {shape}, got {pattern.shape}")
        # Copies: two layers made from one pattern must not share buffers that a checkpoint is loaded into.
        self.register_buffer("crow_indices", pattern.crow_indices.to(device, copy=True))
        self.register_buffer("col_indices", pattern.col_indices.to(device, copy=True))
        self.values = nn.Parameter(torch.empty(pattern.nnz, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw values and bias from U(-1/sqrt(k), 1/sqrt(k)), with k the live fan-in of the row.

        This is `nn.Linear`'s rule with the number of inputs that a unit really has (Evci et al., "Gradient Flow in
        Sparse Neural Networks and How Lottery Tickets Win", 2020). A unit without connections gets bias zero.
        """
        if self.values.is_meta:
            return
        pattern = self.pattern
        fan_in = pattern.row_counts.double()
        bound = torch.where(fan_in > 0, fan_in.rsqrt(), 0.0)
        per_slot = bound[pattern.row_indices().long()]
        for parameter, scale in ((self.values, per_slot), (self.bias, bound)):
            if parameter is not None:
                # Drawn on the CPU so that a seed gives the same numbers on every device.
                draw = torch.rand(parameter.shape, generator=generator, dtype=torch.float64, device="cpu") * 2 - 1
                parameter.copy_(draw.to(parameter.device) * scale)

    def forward(self, x: Tensor) -> Tensor:
        """y = x @ W.T + bias for `x` [..., in_features]."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"expected an input of {self.in_features} features in its last dimension, got shape {tuple(x.shape)}"
            )
        return sparse_linear(x, self.values, self.bias, self.crow_indices, self.col_indices)

    @property
    def pattern(self) -> Pattern:
        """The connections, as a frozen `Pattern`: a copy, made and checked in every call."""
        shape = (self.out_features, self.in_features)
        return Pattern(shape, self.crow_indices.clone(), self.col_indices.clone())

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

    @classmethod
    def from_dense(cls, linear: nn.Linear, pattern: Pattern | None = None) -> SparseLinear:
        """The sparse layer that computes what `linear` does with the weights outside `pattern` set to zero.

        Without a pattern, the nonzeros of `linear.weight` are the connections. Keeps device, dtype, training mode
        and `requires_grad`; shares no memory with `linear`.

        >>> linear = nn.Linear(3, 2)
        >>> _ = linear.weight.data[0].zero_()
        >>> SparseLinear.from_dense(linear)
        SparseLinear(in_features=3, out_features=2, bias=True, nnz=3, sparsity=0.5)
        """
        weight = linear.weight.detach()
        pattern = patterns.from_dense(weight) if pattern is None else pattern
        if pattern.shape != tuple(weight.shape):
            raise ValueError(f"expected a pattern of shape {tuple(weight.shape)}, got {pattern.shape}")
        pattern = pattern.to(weight.device)
        # Built on meta so that no initial values are drawn: converting a layer must not move the global RNG.
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta", weight.dtype, density=1)
        layer.crow_indices, layer.col_indices = pattern.crow_indices.clone(), pattern.col_indices.clone()
        values = weight[pattern.row_indices().long(), pattern.col_indices.long()]
        layer.values = nn.Parameter(values, requires_grad=linear.weight.requires_grad)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
        return layer.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """The `nn.Linear` that computes the same, zeros written out; shares no memory with this layer."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.values.dtype
        )
        weight = self.pattern.to_dense(self.values.detach())
        linear.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"nnz={self.nnz}, sparsity={self.sparsity:.4g}"
        )

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
        problem = self._load_problem(state_dict, prefix, assign)
        if problem:
            error_msgs.append(f"SparseLinear {prefix.rstrip('.') or '(root)'}: {problem}")
            return
        values = state_dict.get(prefix + "values")
        if values is not None and "values" in self._parameters and values.numel() != self.nnz:
            self.col_indices = self.col_indices.new_empty(values.numel())
            self._resize_values(values.numel())
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _resize_values(self, nnz: int) -> None:
        # The same Parameter object, so that an optimizer that holds it goes on holding it. Autograd remembers the
        # shape of a leaf's gradient until its data changes type: hence the detour.
        data = self.values.data
        self.values.grad = None
        self.values.data = data.new_empty(0, dtype=torch.float16)
        self.values.data = data.new_empty(nnz)

    def _load_problem(self, state_dict: dict[str, Any], prefix: str, assign: bool) -> str | None:
        if "values" not in self._parameters:
            return None  # torch.nn.utils.prune or a parametrization has taken the parameter over
        names = ("values", "crow_indices", "col_indices")
        missing = [name for name in names if prefix + name not in state_dict]
        if prefix + "weight" in state_dict and missing:
            return (
                "the checkpoint holds a dense weight here; load it into the dense model and convert that with "
                "offpath.sparsify(model, method='magnitude') or SparseLinear.from_dense"
            )
        if len(missing) == len(names):
            return None  # nothing about this layer: the default loading reports the missing keys
        if missing:
            return (
                f"expected {', '.join(names)}, but {', '.join(missing)} is missing; values without their topology "
                "mean nothing, so save the whole state_dict() and load that"
            )
        values, crow_indices, col_indices = (state_dict[prefix + name] for name in names)
        if values.is_meta and not (assign or self.values.is_meta):
            return "expected tensors with data, got a checkpoint on the meta device"
        if values.dim() != 1 or values.numel() != col_indices.numel():
            return f"expected one value a column, got shapes {tuple(values.shape)} and {tuple(col_indices.shape)}"
        bias = state_dict.get(prefix + "bias")
        if bias is not None and self.bias is not None and bias.shape != self.bias.shape:
            return f"expected a bias of shape {tuple(self.bias.shape)}, got {tuple(bias.shape)}"
        try:
            Pattern((self.out_features, self.in_features), crow_indices, col_indices)
        except PatternError as error:
            return f"the topology does not fit a {self.out_features} x {self.in_features} layer: {error}"
        return None


def _density(sparsity: float | None, density: float | None) -> float:
    if density is not None:
        if not 0 < density <= 1:  # also refuses NaN
            raise ValueError(f"expected density in (0, 1], got {density}")
        return density
    sparsity = DEFAULT_SPARSITY if sparsity is None else sparsity
    if not (0 <= sparsity < 1) or math.isnan(sparsity):
        raise ValueError(f"expected sparsity in [0, 1), got {sparsity}; 0.9 keeps one connection in ten")
    return 1 - sparsity
