"""`KWinners` and `KWinners2d`: k units of a sample win, and those that rarely do are helped along."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offpath.nn.boosting import KWinnersBase, positive_counts
from offpath.nn.sparse_output import flatten
from offpath.ops import SparseRows


class KWinners(KWinnersBase):
    """k-winners of n units with boosting, with the arguments and buffers of nupic.torch's layer of that name.

    Input [..., n]. Output: a tensor of that shape, or with `output="rows"` `SparseRows` of the flattened leading
    dimensions. k is round(n * `percent_on`), in eval mode int(k * `k_inference_factor`). Which units win, what
    `break_ties` does and how boosting works is told in `KWinnersBase`. `inplace` writes the zeros into the input.
    Raises `ValueError` for an input of other than n units, and for arguments out of range.

    >>> import torch
    >>> layer = KWinners(4, percent_on=0.5)
    >>> layer(torch.tensor([[1.0, 4.0, 3.0, 2.0]]))
    tensor([[0., 4., 3., 0.]])
    >>> layer.duty_cycle
    tensor([0., 1., 1., 0.])
    >>> layer(torch.tensor([[1.0, 4.0, 3.0, 2.0]]))  # boosting: 3 / e is less than 2
    tensor([[0., 4., 0., 2.]])
    """

    def __init__(
        self,
        n: int,
        percent_on: float,
        k_inference_factor: float = 1.5,
        boost_strength: float = 1.0,
        boost_strength_factor: float = 0.9,
        duty_cycle_period: int = 1000,
        break_ties: bool = False,
        relu: bool = False,
        inplace: bool = False,
        output: str = "dense",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            percent_on,
            k_inference_factor,
            boost_strength,
            boost_strength_factor,
            duty_cycle_period,
            break_ties,
            relu,
            inplace,
            output,
            (n,),
            device,
        )
        self.n = n

    def forward(self, x: Tensor) -> SparseRows | Tensor:
        matrix, boost = flatten(x, self.n), self._boost()
        y: SparseRows | Tensor
        if self.output == "rows":
            y = self._winners(matrix, boost)
        else:
            y = self._silence(x, self._losers(matrix, boost).view(x.shape))
        if self.training and x.numel() > 0:
            positive = positive_counts(y) if isinstance(y, SparseRows) else (flatten(y) > 0).sum(0)
            self._count(positive, matrix.shape[0])
        return y

    @property
    def k(self) -> int:
        """Number of winners in training mode."""
        return round(self.n * self.percent_on)

    @property
    def k_inference(self) -> int:
        """Number of winners in eval mode."""
        return int(self.k * self.k_inference_factor)

    def extra_repr(self) -> str:
        return f"n={self.n}, {super().extra_repr()}"


class KWinners2d(KWinnersBase):
    """k-winners of feature maps with boosting, with the arguments and buffers of nupic.torch's layer of that name.

    Input [batch, channels, height, width]. All positions of a sample compete, k = round(channels * height * width *
    `percent_on`), or with `local` the channels of each position among themselves, k = round(channels * `percent_on`).
    A channel has one duty cycle, the mean over its positions. Output: a tensor of the input's shape, or with
    `output="rows"` `SparseRows`: of shape (batch, channels * height * width), as `nn.Flatten` orders them, and with
    `local` of shape (batch * height * width, channels). The rest is as for `KWinners`.

    >>> import torch
    >>> maps = torch.tensor([[[[1.0, 2.0]], [[4.0, 3.0]]]])
    >>> KWinners2d(2, percent_on=0.5)(maps).flatten()
    tensor([0., 0., 4., 3.])
    >>> layer = KWinners2d(2, percent_on=0.5, local=True, output="rows")
    >>> layer(maps)
    SparseRows(shape=(2, 2), nnz=2, float32, 1 in a row)
    >>> layer.duty_cycle.flatten()
    tensor([0., 1.])
    """

    def __init__(
        self,
        channels: int,
        percent_on: float = 0.1,
        k_inference_factor: float = 1.5,
        boost_strength: float = 1.0,
        boost_strength_factor: float = 0.9,
        duty_cycle_period: int = 1000,
        local: bool = False,
        break_ties: bool = False,
        relu: bool = False,
        inplace: bool = False,
        output: str = "dense",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            percent_on,
            k_inference_factor,
            boost_strength,
            boost_strength_factor,
            duty_cycle_period,
            break_ties,
            relu,
            inplace,
            output,
            (1, channels, 1, 1),
            device,
        )
        self.channels = channels
        self.local = local

    def forward(self, x: Tensor) -> SparseRows | Tensor:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"expected [batch, {self.channels}, height, width], got shape {tuple(x.shape)}")
        batch, channels, height, width = x.shape
        if self.local:
            matrix = x.permute(0, 2, 3, 1).reshape(batch * height * width, channels)
            boost = self._boost().flatten()
        else:
            matrix = x.reshape(batch, channels * height * width)
            boost = self._boost().expand(1, channels, height, width).flatten()
        y: SparseRows | Tensor
        if self.output == "rows":
            y = self._winners(matrix, boost)
        else:
            losers = self._losers(matrix, boost)
            if self.local:
                losers = losers.view(batch, height, width, channels).permute(0, 3, 1, 2)
            y = self._silence(x, losers.reshape(x.shape))
        if self.training and x.numel() > 0:
            positive = positive_counts(y) if isinstance(y, SparseRows) else (y > 0).sum((0, 2, 3))
            self._count(positive.view(channels, -1).sum(1) / (height * width), batch)
        return y

    def extra_repr(self) -> str:
        return f"channels={self.channels}, local={self.local}, {super().extra_repr()}"


def update_boost_strength(module: nn.Module) -> None:
    """Multiply the boost strength of a k-winners layer by its factor, for `model.apply` after each epoch.

    >>> model = nn.Sequential(nn.Linear(3, 4), KWinners(4, 0.5))
    >>> _ = model.apply(update_boost_strength)
    >>> model[1].boost_strength
    tensor(0.9000)
    """
    if isinstance(module, KWinnersBase):
        module.update_boost_strength()
