"""What a sparse autoencoder is trained for: the variance that it leaves unexplained, and what is added to that."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SAELoss:
    """What `SparseAutoencoder.loss` found; `total` and its three terms carry gradients, the other numbers do not.

    `total` = `fvu` + aux_coefficient * `aux` + l0_coefficient * `l0_loss`. `fvu` is the fraction of the variance that
    is left unexplained, sum |x - reconstruction|^2 / sum |x - mean of the batch|^2; `aux` the same for the residual, of
    which the dead latents explain a part (0 where none is dead); `l0_loss` is 0 but for JumpReLU. `mse` is the mean
    over all entries, `l0` the mean number of live latents of a row, `dead` the number of dead latents.
    """

    total: Tensor
    fvu: Tensor
    aux: Tensor
    l0_loss: Tensor
    mse: Tensor
    l0: Tensor
    dead: int


def share_of_variance(error: Tensor, of: Tensor, refusal: str = "") -> Tensor:
    """sum error^2 / sum (of - its mean over rows)^2.

    Of a batch without variance it is 0 if the batch is empty, else refused where there is a `refusal`, else 0.
    """
    # Rows that are all the same have exactly no variance so; their mean is rounded.
    apart = of - of[:1]
    variance = (apart - apart.mean(0)).square().sum() if of.shape[0] else of.new_zeros(())
    if variance == 0:
        if refusal and of.shape[0]:
            raise ValueError(f"{refusal}, got {of.shape[0]} that are all the same; give a larger batch")
        return error.sum() * 0
    return error.square().sum() / variance
