"""`SparseLinear`: `nn.Linear` with only the weights that exist."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offpath import pattern as patterns
from offpath.nn.autocast import under_autocast
from offpath.nn.sparse_weight import CsrWeightModule
from offpath.ops import PREFERENCES, Explanation, explain, sparse_linear_of
from offpath.pattern import Pattern


class SparseLinear(CsrWeightModule):
    """A linear layer that stores and computes only the connections of its pattern.

    Input [..., in_features], output [..., out_features], float32, float64 or bfloat16. Its parameters are `values`
    [nnz], in row-major order of the connections, and `bias` [out_features]. The topology travels with the `state_dict`
    as `crow_indices` and `col_indices` (int32); as attributes these are copies, so that nothing but loading a
    checkpoint and `offpath.nn.rewire` changes which connections a layer has.

    `prefer` "speed" computes each product in whichever way is the fastest on this machine (`explain` tells which),
    "memory" never writes the weight out dense, nor makes a plan that takes a layer beyond its dense weight in
    inference. `feature_major` (see `offpath.fuse`) lets the output be a strided view
    that the next sparse layer need not transpose.

    `torch.nn.utils.prune` and `weight_norm` may compute `values`; parametrizations, whose registry takes no such name,
    cannot.

    Give `sparsity` in [0, 1) (the default is 0.9) or `density` in (0, 1] for a random pattern of exactly
    round(density * out * in) connections, or a `pattern`. Raises `ValueError` for anything else.

    >>> import torch
    >>> layer = SparseLinear(784, 100, sparsity=0.9)
    >>> layer
    SparseLinear(in_features=784, out_features=100, bias=True, nnz=7840, sparsity=0.9)
    >>> layer(torch.randn(32, 784)).shape
    torch.Size([32, 100])
    """

    sides = ("out", "in")
    from_dense_by = "offpath.sparsify(model, method='magnitude') or SparseLinear.from_dense"

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
        if prefer not in PREFERENCES:
            raise ValueError(f"expected prefer to be 'speed' or 'memory', got {prefer!r}")
        super().__init__(in_features, out_features, bias, device, dtype, sparsity, density, pattern, generator)
        self.prefer = prefer
        self.feature_major = False

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
        # As attributes, nn.Module would look for each in three places, in Python: together a microsecond.
        own = self._parameters
        as_usual = "values" in own and "bias" in own
        values, bias = (own["values"], own["bias"]) if as_usual else (self.values, self.bias)
        operands = under_autocast(x, values, bias)  # type: ignore[arg-type]  # values are never None
        return sparse_linear_of(self._connections, *operands, self.prefer, self.feature_major)

    def explain(self, batch: int) -> Explanation:
        """How this layer computes its products for a batch of so many tokens, and what the alternatives cost.

        The first call on a machine measures its kernels, which takes seconds. Raises `ValueError` for what is no count.

        >>> layer = SparseLinear(64, 64)
        >>> layer.explain(256).chosen["forward"] in ("bucketed", "row-wise", "bitmap", "filled", "dense")
        True
        """
        return explain(self.values, (self.out_features, self.in_features), batch, self.prefer)

    @classmethod
    def from_dense(cls, linear: nn.Linear, pattern: Pattern | None = None) -> SparseLinear:
        """The sparse layer that computes what `linear` does with the weights outside `pattern` set to zero.

        Without a pattern, the nonzeros of `linear.weight` are the connections. Keeps device, dtype, training mode
        and `requires_grad`; shares no memory with `linear`. Raises `ValueError` for a layer of another kind.

        >>> linear = nn.Linear(3, 2)
        >>> _ = linear.weight.data[0].zero_()
        >>> SparseLinear.from_dense(linear)
        SparseLinear(in_features=3, out_features=2, bias=True, nnz=3, sparsity=0.5)
        """
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                f"expected nn.Linear, got {type(linear).__name__}; SparseConv1d and SparseConv2d are for convolutions, "
                "offpath.compress also knows transformers' Conv1D"
            )
        weight = linear.weight.detach()
        pattern = patterns.from_dense(weight) if pattern is None else pattern
        patterns.expect(pattern, tuple(weight.shape))
        pattern = pattern.to(weight.device)
        values = weight[pattern.row_indices().long(), pattern.col_indices.long()]
        return cls._holding(pattern, values, linear.weight.requires_grad, linear)

    def to_dense(self) -> nn.Linear:
        """The `nn.Linear` that computes the same, zeros written out; shares no memory with this layer.

        Raises `RuntimeError` where the values are not those of the layer's topology.
        """
        self._check_given_away()
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.values.dtype
        )
        weight = self.pattern.to_dense(self.values.detach())
        linear.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)
