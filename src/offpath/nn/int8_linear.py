"""`Int8SparseLinear`: a `SparseLinear` whose values take one byte each, for inference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from offpath import pattern as patterns
from offpath.nn.autocast import input_under_autocast
from offpath.nn.casts import keep_dtypes
from offpath.nn.linear import SparseLinear
from offpath.nn.quantise import quantise_rows
from offpath.nn.sparse_weight import CsrWeightModule
from offpath.ops import ACTIVATIONS, PREFERENCES, Connections, int8_linear_of
from offpath.pattern import Pattern


class Int8SparseLinear(CsrWeightModule):
    """A sparse linear layer of int8 values with one float32 scale for each output: W[r, c] = scales[r] * values[s].

    Input [..., in_features], output [..., out_features] in the dtype of the input: float32, float64 or bfloat16. It
    computes with the activations as they are (weights alone are quantised), sums in float32 at least, and multiplies
    the sum by the row's scale; in bfloat16 both may be rounded before the bias is added. It holds buffers and no
    parameters: `values` int8 [nnz], `scales` float32 [out_features] (in any dtype of the model) and `bias`
    [out_features]. The topology travels with the `state_dict` as `crow_indices` and `col_indices`.

    Made by `from_sparse`; built by its sizes, it has the connections of `pattern` (none by default) with zero values
    and waits for a checkpoint. Raises `RuntimeError` for an input that requires a gradient.

    >>> sparse = SparseLinear(784, 100, sparsity=0.9)
    >>> layer = Int8SparseLinear.from_sparse(sparse)
    >>> layer
    Int8SparseLinear(in_features=784, out_features=100, bias=True, nnz=7840, sparsity=0.9)
    >>> x = torch.randn(32, 784)
    >>> bool((layer(x) - sparse(x)).abs().max() < 0.05)
    True
    """

    sides = ("out", "in")
    from_dense_by = "SparseLinear.from_dense and Int8SparseLinear.from_sparse"
    value_names = ("values", "scales")
    values: Tensor  # type: ignore[assignment]  # a buffer here
    scales: Tensor
    bias: Tensor | None  # type: ignore[assignment]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pattern: Pattern | None = None,
        prefer: str = "speed",
        activations: str = "float",
    ) -> None:
        if prefer not in PREFERENCES:
            raise ValueError(f"expected prefer to be 'speed' or 'memory', got {prefer!r}")
        if activations not in ACTIVATIONS:
            raise ValueError(f"expected activations to be 'float' or 'int8', got {activations!r}")
        nn.Module.__init__(self)  # not that of a layer which draws parameters
        device = torch.get_default_device() if device is None else device
        self.in_features, self.out_features = in_features, out_features
        self.prefer, self.activations = prefer, activations
        pattern = patterns.random(self.pattern_shape, 0, device=device) if pattern is None else pattern
        patterns.expect(pattern, self.pattern_shape, "(out, in) = ")
        self._set_connections(Connections(pattern.to(device)))
        self.register_buffer("values", torch.zeros(pattern.nnz, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.ones(out_features, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """y = x @ W.T + bias for `x` [..., in_features]."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"expected an input of {self.in_features} features in its last dimension, got shape {tuple(x.shape)}"
            )
        if torch.compiler.is_compiling():
            self._check_when_compiled()
        else:
            self._check_digest()
        x = input_under_autocast(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return int8_linear_of(self._connections, x, self.values, self.scales, bias, self.prefer, self.activations)

    @classmethod
    def from_sparse(cls, layer: SparseLinear, activations: str = "float") -> Int8SparseLinear:
        """The int8 layer with the connections of `layer`: scales[r] = max |w[r]| / 127, values rounded to the nearest.

        Each weight is off by at most scales[r] / 2. Keeps device, bias and training mode; shares no memory with
        `layer`. Raises `ValueError` for weights that are not finite or beyond float32, and for layers of another kind.
        """
        if not isinstance(layer, SparseLinear):  # others have patterns that mean something else, or scales
            raise ValueError(f"expected a SparseLinear, got {type(layer).__name__}; SparseLinear.from_dense makes one")
        layer._check_given_away()
        pattern = layer.pattern
        quantised = cls(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            layer.values.device,
            layer.values.dtype,
            pattern=pattern,
            prefer=layer.prefer,
            activations=activations,
        )
        rows = pattern.row_indices().long()
        quantised.values, quantised.scales = quantise_rows(layer.values.detach(), rows, layer.out_features)
        if layer.bias is not None:
            quantised.bias = layer.bias.detach().clone()
        return quantised.train(layer.training)

    def to_sparse(self, dtype: torch.dtype = torch.float32) -> SparseLinear:
        """The trainable `SparseLinear` with the weights that this layer computes with, in `dtype`."""
        pattern = self.pattern
        weights = self.values.double() * self.scales.double()[pattern.row_indices().long()]
        layer = SparseLinear._holding(pattern, weights.to(dtype), True, self)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.to(dtype, copy=True))
        layer.prefer = self.prefer
        return layer

    def _resize_values(self, nnz: int) -> None:
        self.values = self.values.new_empty(nnz)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8SparseLinear:
        before = {"values": self.values, "scales": self.scales}
        super()._apply(fn, recurse)
        keep_dtypes(self, before)  # .bfloat16() and the like are about activations
        return self
