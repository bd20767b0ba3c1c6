"""`SparseSparseLinear`: a sparse weight that meets sparse activations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offpath.nn.autocast import under_autocast
from offpath.nn.linear import SparseLinear
from offpath.nn.sparse_weight import SparseWeightModule
from offpath.ops import SparseRows, sparse_matmul, sparse_matmul_of_nonzeros
from offpath.ops.library import as_rows
from offpath.pattern import Pattern


class SparseSparseLinear(SparseWeightModule):
    """`SparseLinear` for inputs of which each sample has a few live units: only their connections are used.

    y = x @ W.T + bias for `x` `SparseRows` of shape (rows, in_features), giving [rows, out_features] in float32,
    float64 or bfloat16. The work is in proportion to the product of both densities ("sparse-sparse", Hunter, Spracklen
    and Ahmad, "Two Sparsities Are Better Than One", 2022). A dense tensor [..., in_features] is taken for the rows of
    its nonzeros: an entry that is zero gets a gradient of zero, which is right behind a ReLU or a selection and nowhere
    else.

    The parameters are `values` [nnz], ordered by input, and `bias` [out_features]. The weight is stored by input, so
    that the connections of a live unit lie side by side: `pattern` has shape (in_features, out_features), and the
    topology travels with the `state_dict` in the names of a CSC weight, `ccol_indices` [in_features + 1] and
    `row_indices` [nnz] (int32); as attributes these are copies. Which connections there are is given as for
    `SparseLinear`, and initial values are distributed as there. Raises `ValueError` for an input of another width.

    >>> from offpath.nn import TopK
    >>> layer = SparseSparseLinear(784, 100, sparsity=0.9)
    >>> layer
    SparseSparseLinear(in_features=784, out_features=100, bias=True, nnz=7840, sparsity=0.9)
    >>> layer(TopK(78)(torch.randn(32, 784))).shape
    torch.Size([32, 100])
    """

    sides = ("in", "out")
    from_dense_by = "SparseSparseLinear.from_linear"
    index_names = ("ccol_indices", "row_indices")

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
        super().__init__(in_features, out_features, bias, device, dtype, sparsity, density, pattern, generator)

    def forward(self, x: SparseRows | Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"expected SparseRows or a tensor of {self.in_features} features, got shape {x.shape}")
        if torch.compiler.is_compiling():
            self._check_when_compiled()
        else:
            self._check_digest()
        operand = x if isinstance(x, Tensor) else x.values
        operand, weight, bias = under_autocast(operand, self.values, self.bias)
        connections = self._connections.crow_indices, self._connections.col_indices, self.out_features
        if isinstance(x, Tensor):
            y = sparse_matmul_of_nonzeros(as_rows(operand), weight, *connections).view(*x.shape[:-1], self.out_features)
        else:
            y = sparse_matmul(x.with_values(operand), weight, *connections)
        return y if bias is None else y + bias

    @property
    def ccol_indices(self) -> Tensor:
        """Where each input's connections begin, int32 [in_features + 1]: a copy."""
        return self._connections.crow_indices.clone()

    @property
    def row_indices(self) -> Tensor:
        """The output of each connection, int32 [nnz]: a copy."""
        return self._copy_of_columns()

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> SparseSparseLinear:
        """The layer that computes what `linear` does; the nonzeros of its weight are the connections.

        >>> linear = nn.Linear(3, 2)
        >>> _ = linear.weight.data[0].zero_()
        >>> SparseSparseLinear.from_linear(linear)
        SparseSparseLinear(in_features=3, out_features=2, bias=True, nnz=3, sparsity=0.5)
        """
        return cls.from_sparse_linear(SparseLinear.from_dense(linear))

    @classmethod
    def from_sparse_linear(cls, layer: SparseLinear) -> SparseSparseLinear:
        """The layer that computes what `layer` does; keeps dtype, device, mode, `requires_grad`, shares no memory.

        Raises `ValueError` for a layer of another kind.

        >>> SparseSparseLinear.from_sparse_linear(SparseLinear(4, 3, density=0.25)).to_sparse_linear()
        SparseLinear(in_features=4, out_features=3, bias=True, nnz=3, sparsity=0.75)
        """
        if not isinstance(layer, SparseLinear):
            raise ValueError(f"expected a SparseLinear, got {type(layer).__name__}")
        return cls._holding(*_turned(layer), layer.values.requires_grad, layer)

    def to_sparse_linear(self) -> SparseLinear:
        """The `SparseLinear` that computes the same; shares no memory with this layer."""
        return SparseLinear._holding(*_turned(self), self.values.requires_grad, self)


def _turned(layer: SparseWeightModule) -> tuple[Pattern, Tensor]:
    pattern = layer.pattern
    crow_indices, col_indices, permutation = pattern.transpose()
    turned = Pattern((pattern.shape[1], pattern.shape[0]), crow_indices, col_indices)
    return turned, layer.values.detach()[permutation.long()]
