"""`SparseLinear`: `nn.Linear` with only the weights that exist."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from offpath import pattern as patterns
from offpath.nn.autocast import under_autocast
from offpath.nn.loading import load_problem
from offpath.nn.parameter import replace_values
from offpath.ops import PREFERENCES, Connections, Explanation, explain, sparse_linear
from offpath.pattern import Pattern

DEFAULT_SPARSITY = 0.9


class SparseLinear(nn.Module):
    """A linear layer that stores and computes only the connections of its pattern.

    Input [..., in_features], output [..., out_features], float32, float64 or bfloat16. Its parameters are `values`
    [nnz], in row-major order of the connections, and `bias` [out_features]. The topology travels with the `state_dict`
    as `crow_indices` and `col_indices` (int32); as attributes these are copies, so that nothing but loading a
    checkpoint and `offpath.nn.rewire` changes which connections a layer has.

    `prefer` "speed" computes each product in whichever way is the fastest on this machine (`explain` tells which),
    "memory" never writes the weight out dense. `feature_major` (see `offpath.fuse`) lets the output be a strided view
    that the next sparse layer need not transpose.

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
    topology_digest: Tensor

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
        prefer: str = "speed",
    ) -> None:
        super().__init__()
        if prefer not in PREFERENCES:
            raise ValueError(f"expected prefer to be 'speed' or 'memory', got {prefer!r}")
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
        self.prefer = prefer
        self.feature_major = False
        self._set_connections(Connections(pattern.to(device)))
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
        if not torch.compiler.is_compiling():
            self._check_digest()
        connections = self._connections
        return sparse_linear(
            *under_autocast(x, self.values, self.bias),
            connections.crow_indices,
            connections.col_indices,
            self.prefer,
            self.feature_major,
        )

    def explain(self, batch: int) -> Explanation:
        """How this layer computes its products for a batch of so many tokens, and what the alternatives cost.

        The first call on a machine measures its kernels, which takes seconds.

        >>> layer = SparseLinear(64, 64)
        >>> layer.explain(256).chosen["forward"] in ("bucketed", "row-wise", "bitmap", "dense")
        True
        """
        return explain(self.values, (self.out_features, self.in_features), batch, self.prefer)

    @property
    def pattern(self) -> Pattern:
        """The connections, as a frozen `Pattern`: a copy, made and checked in every call."""
        return self._connections.pattern

    @property
    def connections(self) -> Connections:
        """The topology as the ops take it, for those who call them themselves; not to be written into."""
        return self._connections

    @property
    def crow_indices(self) -> Tensor:
        """Where each row's connections begin, int32 [out_features + 1]: a copy."""
        return self._connections.crow_indices.clone()

    @property
    def col_indices(self) -> Tensor:
        """The input of each connection, int32 [nnz]: a copy."""
        return self._connections.col_indices.clone()

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
        layer._set_connections(Connections(pattern))
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

    def _set_connections(self, connections: Connections) -> None:
        self._connections = connections
        # DistributedDataParallel broadcasts the values of one process to all, and this number with them: where the
        # topologies differ it no longer fits, instead of values landing on other connections in silence.
        self._digest = self._connections.digest()
        digest = torch.tensor(self._digest, device=connections.device)
        self.register_buffer("topology_digest", digest, persistent=False)

    def _check_digest(self) -> None:
        if not self.topology_digest.is_meta and self.topology_digest.item() != self._digest:
            raise RuntimeError(
                "expected values that belong to this layer's topology, but another process has broadcast its own: the "
                "topologies differ. Build the model from one seed in every process, or load one checkpoint in all of "
                "them, before wrapping it"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        super()._apply(fn, recurse)
        if not self._connections.col_indices.is_meta or self.values.is_meta:
            self._connections = self._connections.to(self.values.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "crow_indices"] = self.crow_indices
        destination[prefix + "col_indices"] = self.col_indices

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
        problem = load_problem(self, state_dict, prefix, assign)
        if problem:
            error_msgs.append(f"SparseLinear {prefix.rstrip('.') or '(root)'}: {problem}")
            return
        crow_indices, col_indices = (state_dict.get(prefix + name) for name in ("crow_indices", "col_indices"))
        if crow_indices is None or col_indices is None:
            if strict:
                missing_keys += [prefix + name for name in ("crow_indices", "col_indices")]
        elif "values" in self._parameters:
            device = col_indices.device if assign else self.values.device
            shape = (self.out_features, self.in_features)
            pattern = Pattern(shape, crow_indices.detach().to(device), col_indices.detach().to(device))
            self._set_connections(self._connections.same_or_new(pattern))
            if pattern.nnz != self.values.numel():
                replace_values(self.values, self.values.new_empty(pattern.nnz).detach())
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in ("crow_indices", "col_indices"):
            if prefix + name in unexpected_keys:  # torch knows parameters and buffers only
                unexpected_keys.remove(prefix + name)


def _density(sparsity: float | None, density: float | None) -> float:
    if density is not None:
        if not 0 < density <= 1:  # also refuses NaN
            raise ValueError(f"expected density in (0, 1], got {density}")
        return density
    sparsity = DEFAULT_SPARSITY if sparsity is None else sparsity
    if not (0 <= sparsity < 1) or math.isnan(sparsity):
        raise ValueError(f"expected sparsity in [0, 1), got {sparsity}; 0.9 keeps one connection in ten")
    return 1 - sparsity
