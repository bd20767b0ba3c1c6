"""`KWinners` and `KWinners2d`: k units of a sample win, and those that rarely do are helped along."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from offpath.nn.sparse_output import check_output, flatten
from offpath.nn.statistics import KeepsStatistics
from offpath.ops import SparseRows, topk_rows


class KWinnersBase(KeepsStatistics):
    """What `KWinners` and `KWinners2d` share: who wins, and how often each unit has.

    A unit's score is x * exp(-boost_strength * duty_cycle). Ahmad and Scheinkman ("How Can We Be So Dense?", 2019)
    write exp(boost_strength * (k/n - duty_cycle)): that differs by one factor for all units, and so in nothing that
    ranks them. The k largest scores of a sample win, also in eval mode, there `k_inference` of them.
    Winners pass x itself, and its gradient; the others are zero.

    With `break_ties` there are exactly k, of equal scores those with the lowest index. Without, which is the default,
    every unit whose score equals the k-th largest wins as well, as in nupic.torch. With `relu`, what is not positive
    is zero and passes no gradient. k = 0 lets nobody win, and NaN counts as the largest.

    While training, `duty_cycle` moves towards the share of samples in which a unit was positive after winning:
    (duty_cycle * (period - batch) + count) / period, where the period is that of `duty_cycle_period` samples, or all
    there have been as long as they are fewer, but never less than the batch: the past has no negative weight.
    `learning_iterations` counts the samples, and unlike in nupic.torch travels with the `state_dict`. A checkpoint
    without it loads: a duty cycle in it counts as one of a whole period.
    """

    boost_strength: Tensor
    duty_cycle: Tensor
    learning_iterations: Tensor

    def __init__(
        self,
        percent_on: float,
        k_inference_factor: float,
        boost_strength: float,
        boost_strength_factor: float,
        duty_cycle_period: int,
        break_ties: bool,
        relu: bool,
        inplace: bool,
        output: str,
        duty_cycle_shape: tuple[int, ...],
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        if not 0 <= percent_on <= 1 or not 0 <= percent_on * k_inference_factor <= 1:
            raise ValueError(
                "expected shares of the units in [0, 1], got percent_on="
                f"{percent_on} and, in eval mode, k_inference_factor={k_inference_factor} times that; lower one of them"
            )
        if not boost_strength >= 0 or not 0 <= boost_strength_factor <= 1 or duty_cycle_period < 1:
            raise ValueError(
                "expected boost_strength >= 0, boost_strength_factor in [0, 1] and duty_cycle_period >= 1, got "
                f"{boost_strength}, {boost_strength_factor} and {duty_cycle_period}"
            )
        if inplace and check_output(output) == "rows":
            raise ValueError("expected inplace=False with output='rows': rows are never written into the input")
        self.percent_on = percent_on
        self.k_inference_factor = k_inference_factor
        self.boost_strength_factor = boost_strength_factor
        self.duty_cycle_period = duty_cycle_period
        self.break_ties = break_ties
        self.relu = relu
        self.inplace = inplace
        self.output = check_output(output)
        strength = torch.tensor(boost_strength, dtype=torch.float32, device=device)
        self.register_buffer("boost_strength", strength)
        self.register_buffer("duty_cycle", torch.zeros(duty_cycle_shape, dtype=torch.float32, device=device))
        self.register_buffer("learning_iterations", torch.zeros((), dtype=torch.int64, device=device))

    def update_boost_strength(self) -> None:
        """Multiply `boost_strength` by `boost_strength_factor`: once an epoch, through `model.apply`."""
        self.boost_strength.mul_(self.boost_strength_factor)

    def _k(self, units: int) -> int:
        k = round(units * self.percent_on)
        return k if self.training else min(int(k * self.k_inference_factor), units)

    def _boost(self) -> Tensor:
        return (-self.boost_strength * self.duty_cycle).exp()

    def _compete(self, x: Tensor, boost: Tensor) -> tuple[SparseRows, Tensor | None]:
        """The k best of `x` [samples, units], and where ties win as well, a mask of all that win."""
        scores = x.detach() * boost
        best = topk_rows(scores, self._k(x.shape[1]))
        if self.break_ties:
            return best, None
        if best.nnz == 0:
            return best, torch.zeros_like(scores, dtype=torch.bool)
        values = best.values.view(x.shape[0], -1)
        least = values.masked_fill(values.isnan(), math.inf).amin(1, keepdim=True)
        return best, ~(scores < least)

    def _winners(self, x: Tensor, boost: Tensor) -> SparseRows:
        best, winning = self._compete(x, boost)
        if winning is not None and int(winning.sum()) > best.nnz:
            rows = SparseRows.from_dense(winning.to(x.dtype)).with_values(x[winning])
        else:
            rows = best.with_values(x.gather(1, best.indices.view(x.shape[0], -1).long()).flatten())
        return rows.relu() if self.relu else rows

    def _losers(self, x: Tensor, boost: Tensor) -> Tensor:
        """The entries of `x` [samples, units] that become zero, as a mask."""
        best, winning = self._compete(x, boost)
        if winning is None:
            losers = torch.ones_like(x, dtype=torch.bool)
            losers.scatter_(1, best.indices.view(x.shape[0], -1).long(), False)
        else:
            losers = ~winning
        return losers | (x.detach() <= 0) if self.relu else losers

    def _silence(self, x: Tensor, losers: Tensor) -> Tensor:
        return x.masked_fill_(losers, 0) if self.inplace else x.masked_fill(losers, 0)

    @torch.no_grad()
    def _count(self, positive: Tensor, batch: int) -> None:
        """Take into `duty_cycle` in how many of `batch` samples each unit was positive."""
        self.learning_iterations += batch
        period = self.learning_iterations.clamp(max=max(self.duty_cycle_period, batch))
        self.duty_cycle.mul_(period - batch).add_(positive.view_as(self.duty_cycle)).div_(period)

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
        duty_cycle, key = state_dict.get(prefix + "duty_cycle"), prefix + "learning_iterations"
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key not in state_dict and duty_cycle is not None and duty_cycle.shape == self.duty_cycle.shape:
            self.learning_iterations.fill_(self.duty_cycle_period if duty_cycle.any() else 0)
            if key in missing_keys:
                missing_keys.remove(key)

    def extra_repr(self) -> str:
        strength = "meta" if self.boost_strength.is_meta else f"{self.boost_strength.item():.4g}"
        return (
            f"percent_on={self.percent_on}, boost_strength={strength}, "
            f"boost_strength_factor={self.boost_strength_factor}, k_inference_factor={self.k_inference_factor}, "
            f"duty_cycle_period={self.duty_cycle_period}, break_ties={self.break_ties}, relu={self.relu}, "
            f"output={self.output!r}"
        )


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
            positive = _positive(y) if isinstance(y, SparseRows) else (flatten(y) > 0).sum(0)
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
    SparseRows(shape=(2, 2), nnz=2, float32, 1 live in a row)
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
            positive = _positive(y).view(channels, -1) if isinstance(y, SparseRows) else (y > 0).sum((0, 2, 3))[:, None]
            self._count(positive.sum(1) / (height * width), batch)
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


def _positive(rows: SparseRows) -> Tensor:
    """In how many rows each column is positive."""
    positive = (rows.values.detach() > 0).long()
    return positive.new_zeros(rows.columns).index_add(0, rows.indices.long(), positive)
