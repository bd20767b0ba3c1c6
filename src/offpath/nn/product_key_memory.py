"""`ProductKeyMemory`: a layer whose weights are looked up, a few of very many for each sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from offpath.nn.sparse_output import check_k, flatten
from offpath.ops import SparseRows, topk_rows


class ProductKeyMemory(nn.Module):
    """A table of keys * keys value rows, of which each head of a sample reads k (Lample et al., "Large Memory Layers
    with Product Keys", 2019; Berges et al., "Memory Layers at Scale", 2024).

    Input [..., in_features], output [..., out_features]. A linear layer makes a query of `key_features` numbers for
    each head. Its first half is compared with one set of `keys` sub-keys, its second half with another; the key of
    value row i * keys + j is sub-key i of the first and sub-key j of the second set, its score the sum of the two dot
    products. So the k best of all keys * keys are among the sums of the k best of either half. The softmax of the k
    scores weighs the value rows, and the heads, which have sub-keys of their own and one table in common, are summed.

    Neither scores of all rows nor copies of the chosen ones are ever stored; the gradient of `values` is zero in rows
    that nobody chose. `query` may be replaced by any module that makes [samples, heads * key_features] of the flattened
    input [samples, in_features], such as one that ends with a batch norm, which Lample et al. recommend. Under autocast
    the table is read in its own dtype, as by `nn.EmbeddingBag`. Raises `ValueError` for an odd `key_features`, for
    k > keys, more than 2^31 - 1 rows, or an input of other than in_features units.

    >>> import torch
    >>> memory = ProductKeyMemory(16, 8, keys=32, k=4, heads=2)
    >>> memory(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 8])
    >>> memory.lookup(torch.randn(10, 16))
    SparseRows(shape=(10, 1024), nnz=80, float32, 8 in a row)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        keys: int,
        k: int = 32,
        heads: int = 4,
        key_features: int = 256,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if key_features % 2 or key_features < 2 or heads < 1:
            raise ValueError(f"expected an even key_features >= 2 and heads >= 1, got {key_features} and {heads}")
        if check_k(k) > keys:
            raise ValueError(f"expected k from 0 to the {keys} sub-keys of a half, got {k}")
        if keys**2 >= 2**31:
            raise ValueError(f"expected at most 2^31 - 1 value rows, got {keys} * {keys}")
        self.in_features = in_features
        self.out_features = out_features
        self.keys = keys
        self.k = k
        self.heads = heads
        self.key_features = key_features
        self.query = nn.Linear(in_features, heads * key_features, device=device, dtype=dtype)
        shape = (heads, 2, keys, key_features // 2)
        self.sub_keys = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.values = nn.Parameter(torch.empty(keys**2, out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw sub-keys as `nn.Linear` does its weight, and values from N(0, 1 / out_features), as Lample et al."""
        self.query.reset_parameters()
        bound = 1 / math.sqrt(self.key_features // 2)
        nn.init.uniform_(self.sub_keys, -bound, bound)
        nn.init.normal_(self.values, std=1 / math.sqrt(max(self.out_features, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.lookup(x).to(self.values.dtype).matmul(self.values).view(*x.shape[:-1], self.out_features)

    def lookup(self, x: Tensor) -> SparseRows:
        """Which value rows the samples read, and with which weights: heads * k entries a row, head by head.

        Heads may name the same row; inside a head the indices are ascending.
        """
        x = flatten(x, self.in_features)
        samples = x.shape[0]
        queries = self.query(x).reshape(samples, self.heads, 2, self.key_features // 2)
        scores = torch.einsum("shcf,hcnf->shcn", queries, self.sub_keys)
        best = topk_rows(scores.reshape(samples * self.heads * 2, self.keys), self.k)
        halves = best.values.view(samples * self.heads, 2, self.k)
        sums = halves[:, 0, :, None] + halves[:, 1, None, :]
        chosen = topk_rows(sums.flatten(1), self.k)
        first, second = best.indices.view(samples * self.heads, 2, self.k).long().unbind(1)
        pairs = chosen.indices.view(samples * self.heads, self.k).long()
        rows = first.gather(1, pairs // max(self.k, 1)) * self.keys + second.gather(1, pairs % max(self.k, 1))
        weights = chosen.values.view(samples * self.heads, self.k).softmax(1)
        shape = (samples, self.heads * self.k)
        return SparseRows.from_topk(weights.reshape(shape), rows.view(shape), self.keys**2)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, keys={self.keys}, k={self.k}, "
            f"heads={self.heads}, key_features={self.key_features}"
        )
