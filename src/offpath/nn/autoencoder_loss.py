"""What a sparse autoencoder is trained for: the variance that it leaves unexplained, and what is added to that."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from offpath.ops.library import wide


@dataclass(frozen=True)
class SAELoss:
    """What `SparseAutoencoder.loss` found; `total` and its three terms carry gradients, the other numbers do not.

    `total` = `fvu` + aux_coefficient * `aux` + l0_coefficient * `l0_loss`. `fvu` is the fraction of the variance that
    is left unexplained, sum |x - reconstruction|^2 / sum |x - mean of the batch|^2; `aux` the same for the residual, of
    which the dead latents explain a part (0 where none is dead); `l0_loss` is 0 but for JumpReLU. `mse` is the mean
    over all entries, `l0` the mean number of live latents of a row, `dead_latents` (bool [latents]) says which are
    dead, `dead` how many, which waits for a GPU.
    """

    total: Tensor
    fvu: Tensor
    aux: Tensor
    l0_loss: Tensor
    mse: Tensor
    l0: Tensor
    dead_latents: Tensor = field(repr=False)

    @property
    def dead(self) -> int:
        """The number of dead latents."""
        return int(self.dead_latents.sum())


def variance_of(rows: Tensor) -> Tensor:
    """sum (rows - their mean)^2: exactly 0 for rows that are all the same, and where there are none.

    In float32 at least: a sum of squares in float16 is soon infinite.
    """
    rows = wide(rows)
    # Their mean is rounded, their differences to the first one are not.
    apart = rows - rows[:1]
    return (apart - apart.mean(0)).square().sum() if rows.shape[0] else rows.new_zeros(())


def expect_variance(variance: Tensor, rows: int) -> None:
    """Raises `ValueError` for rows without variance, unless there are none.

    While a CUDA graph is captured, nobody can look: such rows then have a loss that is not finite.
    """
    if rows and not (variance.is_cuda and torch.cuda.is_current_stream_capturing()) and variance == 0:
        raise ValueError(f"expected rows that differ, got {rows} that are all the same; give a larger batch")
