"""k-winners against an oracle of the published formulas, and nupic.torch's checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from offpath.nn import KWinners, KWinners2d, update_boost_strength
from offpath.ops import SparseRows


def oracle(x: Tensor, duty: Tensor, beta: float, k: int, relu: bool, break_ties: bool) -> Tensor:
    """Who wins of `x` [samples, units]: boosted = x * exp((k / n - duty) * beta), ranked one sample at a time."""
    boosted = x * torch.exp((k / x.shape[1] - duty) * beta)
    wins = torch.zeros_like(x, dtype=torch.bool)
    for sample, row in enumerate(boosted.tolist()):
        ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))
        first = ranked[:k]
        if not break_ties and first:
            first = [i for i in ranked if row[i] >= row[first[-1]]]
        wins[sample, first] = True
    return wins & ((x > 0) | (not relu))


def next_duty(duty: Tensor, y: Tensor, seen: int, period: int) -> Tensor:
    """After `seen` samples, those of `y` [samples, units, positions] among them."""
    period = max(min(period, seen), y.shape[0])
    return (duty * (period - y.shape[0]) + (y > 0).double().mean(2).sum(0)) / period


def check(make: Callable[..., nn.Module], **options) -> None:
    """Train for some steps, evaluate between them, and compare everything with the oracle.

    All numbers are float64, products of distinct numbers: nothing is so close that rounding could turn it around.
    """
    torch.manual_seed(0)
    shape = options.pop("shape", (6, 10))
    layer = make(**options).double()
    local, k_of = getattr(layer, "local", False), partial(_k, layer)
    duty, seen = torch.zeros(shape[1], dtype=torch.float64), 0
    beta = options.get("boost_strength", 1.0)
    for step in range(24):
        training = step % 3 != 2
        x = torch.randn(shape, dtype=torch.float64)
        if step % 4 == 0:
            x[:, 1::2] = x[:, :1]  # ties, unless boosting tells them apart
        maps = x.reshape(*shape[:2], -1)
        matrix = maps.permute(0, 2, 1).reshape(-1, shape[1]) if local else maps.flatten(1)
        boost_of = duty if local else duty.repeat_interleave(maps.shape[2])
        wins = oracle(matrix, boost_of, beta, k_of(matrix.shape[1], training), layer.relu, layer.break_ties)
        if local:
            wins = wins.view(shape[0], -1, shape[1]).permute(0, 2, 1)
        wins, dy = wins.reshape(shape), torch.randn(shape, dtype=torch.float64)
        z = x.clone().requires_grad_()
        y = layer.train(training)(z)
        if isinstance(y, SparseRows):
            y = y.to_dense()
            y = y.view(shape[0], -1, shape[1]).permute(0, 2, 1).reshape(shape) if local else y.view(shape)
        y.backward(dy)
        assert torch.equal(y, torch.where(wins, x, 0)), "output"
        assert torch.equal(z.grad, dy * wins), "gradient"
        if training:
            seen += shape[0]
            duty = next_duty(duty, y.detach().reshape(*shape[:2], -1), seen, layer.duty_cycle_period)
        torch.testing.assert_close(layer.duty_cycle.flatten(), duty, msg="duty cycle")
        assert layer.duty_cycle.min() >= 0 and layer.duty_cycle.max() <= 1, "duty cycle"
        if step == 5:
            layer.apply(update_boost_strength)
            beta *= layer.boost_strength_factor
        duty = layer.duty_cycle.flatten().clone()  # so that the boosts agree to the last bit but the factor
    assert layer.learning_iterations == seen, "learning iterations"


def _k(layer: nn.Module, units: int, training: bool) -> int:
    k = round(units * layer.percent_on)
    return k if training else int(k * layer.k_inference_factor)


DENSE = partial(KWinners, 10, 0.3)
MAPS = partial(KWinners2d, 5, 0.3)


@pytest.mark.parametrize("output", ["rows", "dense"])
@pytest.mark.parametrize("break_ties", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("period", [4, 10, 1000])
def test_kwinners(period: int, relu: bool, break_ties: bool, output: str) -> None:
    options = {"duty_cycle_period": period, "relu": relu, "break_ties": break_ties, "output": output}
    check(DENSE, boost_strength=1.5, **options)


@pytest.mark.parametrize("output", ["rows", "dense"])
@pytest.mark.parametrize("break_ties", [True, False])
@pytest.mark.parametrize("local", [True, False])
def test_kwinners2d(local: bool, break_ties: bool, output: str) -> None:
    check(MAPS, shape=(4, 5, 3, 2), local=local, break_ties=break_ties, output=output, relu=True)


class _BoostsTheBusy(KWinners):
    def _boost(self) -> Tensor:
        return (self.boost_strength * self.duty_cycle).exp()


class _PassesBoostedValues(KWinners):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self._boost()


class _CountsEveryWinner(KWinners):
    def _count(self, positive: Tensor, batch: int) -> None:
        super()._count(positive.clamp(min=1), batch)


class _ForgetsNothing(KWinners):
    """The past's weight becomes negative where the batch is larger than the period, as in nupic.torch."""

    def _count(self, positive: Tensor, batch: int) -> None:
        self.learning_iterations += batch
        period = self.learning_iterations.clamp(max=self.duty_cycle_period)
        self.duty_cycle.mul_(period - batch).add_(positive).div_(period)


class _OneWinnerMore(KWinners):
    def _k(self, units: int) -> int:
        return super()._k(units) + 1


class _EvalAsInTraining(KWinners):
    def _k(self, units: int) -> int:
        return self.k


class _PassesGradientOfLosers(KWinners):
    def _silence(self, x: Tensor, losers: Tensor) -> Tensor:
        return x - (x * losers).detach()


class _BoostsWhileTrainingOnly(KWinners):
    def _boost(self) -> Tensor:
        return super()._boost() if self.training else torch.ones_like(self.duty_cycle)


@pytest.mark.parametrize(
    ("mutant", "found"),
    [
        (_BoostsTheBusy, "output"),
        (_PassesBoostedValues, "output"),
        (_CountsEveryWinner, "duty cycle"),
        (_ForgetsNothing, "duty cycle"),
        (_OneWinnerMore, "output"),
        (_EvalAsInTraining, "output"),
        (_PassesGradientOfLosers, "gradient"),
        (_BoostsWhileTrainingOnly, "output"),
    ],
)
def test_the_checker_can_fail(mutant: type, found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        check(partial(mutant, 10, 0.3), boost_strength=1.5, duty_cycle_period=4)


def test_ties_beyond_k_win_unless_they_are_broken() -> None:
    x = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0, 0.0]])
    assert KWinners(5, 0.4)(x).tolist() == [[1, 2, 1, 1, 0], [3, 2, 0, 0, 0]]
    assert KWinners(5, 0.4, break_ties=True)(x).tolist() == [[1, 2, 0, 0, 0], [3, 2, 0, 0, 0]]
    assert KWinners(5, 0.4, output="rows")(x).crow_indices.tolist() == [0, 4, 6]
    assert KWinners(5, 0.4, output="rows", break_ties=True)(x).crow_indices.tolist() == [0, 2, 4]


@pytest.mark.parametrize("output", ["rows", "dense"])
@pytest.mark.parametrize("break_ties", [True, False])
def test_nobody_wins_with_k_zero(break_ties: bool, output: str) -> None:
    layer = KWinners(4, 0.1, break_ties=break_ties, output=output)
    assert layer.k == 0
    x = torch.ones(3, 4, requires_grad=True)
    y = layer(x)
    y = y.to_dense() if isinstance(y, SparseRows) else y
    y.sum().backward()
    assert not y.any() and not x.grad.any() and not layer.duty_cycle.any()


def test_more_nan_than_winners() -> None:
    x = torch.tensor([[math.nan, 1.0, math.nan, 2.0], [4.0, math.nan, 2.0, 1.0]])
    y = KWinners(4, 0.5)(x)
    assert y.isnan().tolist() == [[True, False, True, False], [False, True, False, False]]
    assert y[1].nan_to_num(9).tolist() == [4, 9, 0, 0]


def test_inplace_writes_into_the_input() -> None:
    x = torch.tensor([[1.0, 4.0, 3.0, 2.0]])
    y = KWinners(4, 0.5, inplace=True)(x)
    assert y is x and x.tolist() == [[0, 4, 3, 0]]
    with pytest.raises(ValueError, match="inplace=False"):
        KWinners(4, 0.5, inplace=True, output="rows")


@pytest.mark.parametrize(
    "layer", [partial(KWinners, 6, 0.3), partial(KWinners2d, 6, 0.3)], ids=["KWinners", "KWinners2d"]
)
def test_checkpoints_of_nupic_torch_load(layer: Callable[[], nn.Module]) -> None:
    """They hold a scalar `boost_strength` and a `duty_cycle` [n] or [1, channels, 1, 1], and nothing else."""
    shape = (1, 6, 1, 1) if layer.func is KWinners2d else (6,)
    theirs = {"0.boost_strength": torch.tensor(0.81), "0.duty_cycle": torch.linspace(0, 0.5, 6).view(shape)}
    model = nn.Sequential(layer())
    assert model.load_state_dict(theirs) == ([], [])
    assert (
        torch.equal(model[0].duty_cycle, theirs["0.duty_cycle"])
        and model[0].boost_strength == theirs["0.boost_strength"]
    )
    assert model[0].learning_iterations == 1000, "what they learned is not thrown away by the first batch"
    theirs["0.duty_cycle"] = torch.zeros(shape)
    fresh = nn.Sequential(layer())
    fresh.load_state_dict(theirs)
    assert fresh[0].learning_iterations == 0, "an untrained one starts as any other"


def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    layer = KWinners(6, 0.3)
    with pytest.raises(RuntimeError, match="size mismatch for duty_cycle"):
        layer.load_state_dict({"boost_strength": layer.boost_strength, "duty_cycle": torch.ones(5)})
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"boost_strength": layer.boost_strength})
    assert layer.learning_iterations == 0


def test_state_goes_on_where_it_stopped() -> None:
    torch.manual_seed(0)
    batches = torch.randn(6, 8, 10)
    straight, first, second = (KWinners(10, 0.3, duty_cycle_period=20) for _ in range(3))
    for x in batches:
        straight(x)
    for x in batches[:3]:
        first(x)
    second.load_state_dict(first.state_dict())
    for x in batches[3:]:
        second(x)
    assert torch.equal(straight.duty_cycle, second.duty_cycle)


@pytest.mark.parametrize(
    "options",
    [
        {"percent_on": 1.1},
        {"percent_on": -0.1},
        {"percent_on": math.nan},
        {"percent_on": 0.8},  # times 1.5 in eval mode
        {"percent_on": 0.3, "boost_strength": -1.0},
        {"percent_on": 0.3, "boost_strength_factor": 1.5},
        {"percent_on": 0.3, "duty_cycle_period": 0},
    ],
)
def test_arguments_out_of_range(options: dict) -> None:
    for kind in (KWinners, KWinners2d):
        with pytest.raises(ValueError, match=r"expected .* got "):
            kind(6, **options)


@pytest.mark.parametrize(
    ("layer", "shape"), [(KWinners(6, 0.3), (2, 5)), (KWinners2d(6), (2, 6, 3)), (KWinners2d(6), (2, 5, 3, 3))]
)
def test_wrong_shapes(layer: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="got shape"):
        layer(torch.ones(shape))
    assert layer.learning_iterations == 0
