"""`JumpReLU`: units live above a threshold that they learn."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from offpath.nn.sparse_output import as_output, check_output, flatten
from offpath.nn.straight_through import jump, step, thresholds_of
from offpath.ops import SparseRows, above
from offpath.ops.library import is_differentiating, wide


class JumpReLU(nn.Module):
    """z where z > theta, else 0, with a threshold theta for each of n units that learns (Rajamanoharan et al., "Jumping
    Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders", 2024).

    Input [..., n] of a floating dtype. Output: `SparseRows` of the flattened leading dimensions, or with
    `output="dense"` a tensor of the input's shape. `forward(x, with_l0=True)` also returns how many units of each
    sample live, shape [...], which is the paper's sparsity loss: `loss = error + weight * l0.mean()`.

    theta is `threshold`, the exponential of the parameter `log_threshold` [n], hence positive. Neither output nor l0
    has a gradient for theta almost everywhere; both get the paper's pseudo-derivative for the rectangle kernel,

        d output / d theta = -theta / bandwidth,    d l0 / d theta = -1 / bandwidth
        where |z - theta| < bandwidth / 2, else 0

    while z gets 1 where it lives, and nothing from l0. So only entries above theta - bandwidth / 2 matter, and only
    those are selected (of a theta below bandwidth / 2, some that are negative). Where theta is trained, rows store the
    zeros just below it as well, since their gradient is needed; `SparseRows.live_counts` leaves them out. NaN lives.
    Raises `ValueError` for a bandwidth or a first threshold that is not positive.

    >>> import torch
    >>> layer = JumpReLU(3, bandwidth=0.5, threshold=1.0)
    >>> rows, l0 = layer(torch.tensor([[0.9, 1.1, 3.0], [0.1, -2.0, 0.2]]), with_l0=True)
    >>> rows.detach().to_dense()
    tensor([[0.0000, 1.1000, 3.0000],
            [0.0000, 0.0000, 0.0000]])
    >>> rows.nnz, l0.tolist()
    (3, [2.0, 0.0])
    >>> l0.sum().backward()
    >>> layer.log_threshold.grad  # theta * -1 / 0.5 for each of the two entries near it
    tensor([-2., -2.,  0.])
    """

    def __init__(
        self,
        n: int,
        bandwidth: float = 0.001,
        threshold: float = 0.001,
        output: str = "rows",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not (bandwidth > 0 and threshold > 0):  # also refuses NaN
            raise ValueError(
                f"expected a bandwidth and a first threshold above 0, got {bandwidth} and {threshold}; a ReLU is "
                "offpath.ops.above(x, 0.0)"
            )
        self.n = n
        self.bandwidth = bandwidth
        self.output = check_output(output)
        self.log_threshold = nn.Parameter(torch.full((n,), math.log(threshold), device=device, dtype=dtype))

    @property
    def threshold(self) -> Tensor:
        """theta [n]."""
        return self.log_threshold.exp()

    def forward(self, x: Tensor, with_l0: bool = False) -> SparseRows | Tensor | tuple[SparseRows | Tensor, Tensor]:
        threshold = self.threshold
        learns = threshold.requires_grad or is_differentiating()
        # Wide: in 16 bits, a threshold less half a bandwidth may be the threshold itself.
        lowest = wide(threshold.detach()) - self.bandwidth / 2 if learns else threshold
        near = above(flatten(x, self.n), lowest)
        theta = thresholds_of(near, threshold)
        output = as_output(near.with_values(jump(near.values, theta, self.bandwidth)), x, self.output)
        if not with_l0:
            return output
        steps = step(near.values, theta, self.bandwidth)
        return output, near.with_values(steps).matmul(theta.new_ones(self.n, 1)).view(x.shape[:-1])

    def extra_repr(self) -> str:
        return f"n={self.n}, bandwidth={self.bandwidth}, output={self.output!r}"
