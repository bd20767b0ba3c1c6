"""`TopK` and `BatchTopK`: the k largest units of a sample live, or k a sample of the whole batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from offpath.nn.sparse_output import as_output, check_k, check_output, flatten
from offpath.nn.statistics import KeepsStatistics, is_recomputing
from offpath.ops import SparseRows, above, batch_topk, topk_rows


class TopK(nn.Module):
    """The k largest units of each sample (Makhzani and Frey, "k-Sparse Autoencoders", 2013).

    Input [..., n] of a floating dtype. Output: `SparseRows` of the flattened leading dimensions, k entries in each row,
    or with `output="dense"` a tensor of the input's shape. With `relu`, entries that are not positive become zero and
    pass no gradient; `SparseRows` go on storing them. Of equal units those with the lowest index live; NaN counts as
    the largest. `k` may be set to another number at any time. Raises `ValueError` for a k that is no int or larger
    than n.

    >>> import torch
    >>> layer = TopK(2)
    >>> layer(torch.tensor([[3.0, 1.0, 2.0, -1.0]]))
    SparseRows(shape=(1, 4), nnz=2, float32, 2 in a row)
    >>> layer.k = 1  # annealing
    >>> layer(torch.tensor([[3.0, 1.0, 2.0, -1.0]])).to_dense()
    tensor([[3., 0., 0., 0.]])
    """

    def __init__(self, k: int, relu: bool = True, output: str = "rows") -> None:
        super().__init__()
        self.k = check_k(k)
        self.relu = relu
        self.output = check_output(output)

    def forward(self, x: Tensor) -> SparseRows | Tensor:
        rows = topk_rows(flatten(x), check_k(self.k))
        return as_output(rows.relu() if self.relu else rows, x, self.output)

    def extra_repr(self) -> str:
        return f"k={self.k}, relu={self.relu}, output={self.output!r}"


class BatchTopK(KeepsStatistics):
    """The k * samples largest units of the whole batch, so that samples share them (Bussmann et al., "BatchTopK Sparse
    Autoencoders", 2024).

    Input and output as for `TopK`, but rows differ in how many entries they have. That is how it trains. In eval mode
    a sample must not depend on its neighbours: there the units live that are larger than `threshold`, the average over
    training batches of the smallest positive value that lived (without `relu`: of the smallest value). The first
    1 / `momentum` batches count alike, then it is a moving average, so that it follows a k that is annealed; batches
    without such a value do not count. As long as `num_batches_tracked` is 0 there is no threshold, and eval mode takes
    the k largest units of each sample, as `TopK` does. Both are persistent buffers; `threshold` stays in float32 when
    the module goes to 16 bits. Raises `ValueError` for a k that is no int or larger than n.

    >>> import torch
    >>> layer = BatchTopK(1)
    >>> layer(torch.tensor([[3.0, 2.0], [1.0, 0.5]])).to_dense()
    tensor([[3., 2.],
            [0., 0.]])
    >>> layer.threshold
    tensor(2.)
    >>> layer.eval()(torch.tensor([[3.0, 2.5], [1.0, 0.5]])).to_dense()
    tensor([[3.0000, 2.5000],
            [0.0000, 0.0000]])
    """

    threshold: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        k: int,
        relu: bool = True,
        output: str = "rows",
        momentum: float = 0.01,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 0 < momentum <= 1:
            raise ValueError(f"expected momentum in (0, 1], got {momentum}")
        self.k = check_k(k)
        self.relu = relu
        self.output = check_output(output)
        self.momentum = momentum
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64, device=device))

    def forward(self, x: Tensor) -> SparseRows | Tensor:
        rows = self._choose(flatten(x), check_k(self.k))
        return as_output(rows.relu() if self.relu else rows, x, self.output)

    def _choose(self, x: Tensor, k: int) -> SparseRows:
        samples, n = x.shape
        if k > n:
            raise ValueError(f"expected k of at most the {n} units of a sample, got {k}")
        if self.training:
            rows = batch_topk(x, k * samples)
            if not is_recomputing():
                self._track(rows.values)
            return rows
        if self.num_batches_tracked == 0:
            return topk_rows(x, k)
        return above(x, self.threshold)

    @torch.no_grad()
    def _track(self, values: Tensor) -> None:
        if values.numel() == 0:
            return
        values = values.to(self.threshold.dtype)
        counts = values > 0 if self.relu else ~values.isnan()
        least = values.masked_fill(~counts, math.inf).min()
        found = least.isfinite()
        self.num_batches_tracked += found
        weight = self.num_batches_tracked.to(values.dtype).reciprocal().clamp(min=self.momentum)
        self.threshold.copy_(torch.where(found, self.threshold.lerp(least, weight), self.threshold))

    def extra_repr(self) -> str:
        return f"k={self.k}, relu={self.relu}, output={self.output!r}, momentum={self.momentum}"
