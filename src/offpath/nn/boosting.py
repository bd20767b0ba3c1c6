"""Who wins among k-winners: boosted scores, ties, and how often each unit has won."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from offpath.nn.sparse_output import check_output
from offpath.nn.statistics import KeepsStatistics, is_recomputing
from offpath.ops import SparseRows, topk_rows
from offpath.ops.library import is_vmapped


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
        if not boost_strength >= 0 or not 0 <= boost_strength_factor <= 1 or not duty_cycle_period >= 1:
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
        if self.training and is_recomputing():
            raise RuntimeError(
                f"expected {type(self).__name__} to run once for each backward pass while it trains, but activation "
                "checkpointing runs it again, and its boost has moved on meanwhile: other units would win. Leave it "
                "out of what is checkpointed"
            )
        return (-self.boost_strength * self.duty_cycle).exp()

    def _compete(self, x: Tensor, boost: Tensor) -> tuple[SparseRows, Tensor, Tensor | None]:
        """The k best of `x` [samples, units], their indices [samples, k], and if ties win too, a mask of who wins."""
        scores = x.detach() * boost
        k = self._k(x.shape[1])
        best = topk_rows(scores, k)
        places = best.indices.view(x.shape[0], k).long()
        if self.break_ties:
            return best, places, None
        if best.nnz == 0:
            return best, places, torch.zeros_like(scores, dtype=torch.bool)
        values = best.values.view(places.shape)
        least = values.masked_fill(values.isnan(), math.inf).amin(1, keepdim=True)
        return best, places, ~(scores < least)

    def _winners(self, x: Tensor, boost: Tensor) -> SparseRows:
        best, places, winning = self._compete(x, boost)
        if winning is not None and not torch.compiler.is_compiling() and is_vmapped(winning):
            raise RuntimeError(
                f"expected {type(self).__name__} to break ties under torch.func.vmap, as samples with ties have more "
                "winners than others; make it with break_ties=True"
            )
        if winning is not None and int(winning.sum()) > best.nnz:
            rows = SparseRows.from_dense(winning.to(x.dtype)).with_values(x[winning])
        else:
            rows = best.with_values(x.gather(1, places).flatten())
        return rows.relu() if self.relu else rows

    def _losers(self, x: Tensor, boost: Tensor) -> Tensor:
        """The entries of `x` [samples, units] that become zero, as a mask."""
        _, places, winning = self._compete(x, boost)
        if winning is None:
            winning = torch.zeros_like(x, dtype=torch.bool).scatter_(1, places, True)
        return ~winning | (x.detach() <= 0) if self.relu else ~winning

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
            grown = not duty_cycle.is_meta and bool(duty_cycle.any())
            self.learning_iterations.fill_(self.duty_cycle_period if grown else 0)
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


def positive_counts(rows: SparseRows) -> Tensor:
    """In how many rows each column is positive."""
    positive = (rows.values.detach() > 0).long()
    return positive.new_zeros(rows.columns).index_add(0, rows.indices.long(), positive)
