"""The parts of a recipe, on bits one can see and against plain sorting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from offpath import pattern as patterns
from offpath.topology import Constant, Cosine, Cubic, Every, LayerView, TopologyError, drop, grow
from offpath.topology.budget import share
from offpath.topology.capture import Pass
from offpath.topology.select import SAMPLE_ENTRIES, highest, lowest


def _view(mask: Tensor, values: Tensor | None = None, gradient: Tensor | None = None, seed: int = 0, passes=()):
    pattern = patterns.from_mask(mask)
    values = torch.zeros(pattern.nnz) if values is None else values
    generator = torch.Generator().manual_seed(seed)
    return LayerView("layer", pattern, values, generator, pattern.nnz, gradient, passes)


def _mask(*rows: str) -> Tensor:
    return torch.tensor([[bit == "1" for bit in row] for row in rows])


@pytest.mark.parametrize(
    ("scores", "count", "low", "high"),
    [
        ([3, 1, 2], 0, [], []),
        ([3, 1, 2], 2, [1, 2], [0, 2]),
        ([3, 1, 2], 3, [0, 1, 2], [0, 1, 2]),
        ([1, 1, 1, 1], 2, [0, 1], [0, 1]),
        ([2, 1, 2, 1, 2], 3, [0, 1, 3], [0, 2, 4]),
        ([0.0, -0.0, 0.0], 1, [0], [0]),
        ([torch.inf, 1, -torch.inf], 2, [1, 2], [0, 1]),
    ],
)
def test_lowest_and_highest_of_visible_scores(scores, count, low, high) -> None:
    assert lowest(torch.tensor(scores, dtype=torch.float32), count).tolist() == low
    assert highest(torch.tensor(scores, dtype=torch.float32), count).tolist() == high


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data(), st.sampled_from(["bfloat16", "float32"]))
def test_lowest_is_the_head_of_a_stable_sort(scores: list[int], data: st.DataObject, dtype: str) -> None:
    count = data.draw(st.integers(0, len(scores)))
    tensor = torch.tensor(scores, dtype=getattr(torch, dtype))
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    assert lowest(tensor, count).tolist() == sorted(order[:count])


@pytest.mark.parametrize("scores", ["Gaussian", "few levels", "ascending", "follows the stride", "never"])
@pytest.mark.parametrize("share_of_all", [0.0001, 0.3, 0.9999, 1.0])
def test_lowest_of_so_many_that_a_sample_is_taken(scores: str, share_of_all: float) -> None:
    n, generator = 40_000, torch.Generator().manual_seed(0)
    draw = torch.randn(n, generator=generator)
    tensor = {
        "Gaussian": draw,
        "few levels": draw.round(),
        "ascending": torch.arange(n).float(),
        "follows the stride": draw.masked_fill(torch.arange(n) % (n // SAMPLE_ENTRIES) == 0, 9.0),
        "never": draw.masked_fill(draw > 0, torch.inf),
    }[scores]
    count = round(share_of_all * n)
    expected = torch.sort(tensor, stable=True).indices[:count].sort().values
    assert torch.equal(lowest(tensor, count), expected)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 99), st.data())
def test_free_positions_are_drawn_among_the_free_ones_and_all_can_be(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.6
    layer = _view(mask, seed=seed)
    free = (~mask).flatten().nonzero().squeeze(1)
    assert layer.free_count == len(free)
    assert torch.equal(layer.draw_free(len(free)), free)
    count = data.draw(st.integers(0, len(free)))
    drawn = layer.draw_free(count)
    assert drawn.tolist() == sorted(set(drawn.tolist())) and set(drawn.tolist()) <= set(free.tolist())
    assert len(drawn) == count and drawn.dtype == torch.int64
    with pytest.raises(TopologyError, match=f"only {len(free)} of {mask.numel()} are free"):
        layer.draw_free(len(free) + 1)


def test_every_free_position_is_drawn_as_often_as_any_other() -> None:
    mask, draws, count = _mask("1010", "0110", "0001"), 4000, 2
    layer = _view(mask)
    counts = torch.zeros(12)
    for _ in range(draws):
        counts[layer.draw_free(count)] += 1
    p = count / 7
    assert float(counts[mask.flatten()].sum()) == 0
    # Binomial counts of 7 positions: 5 standard deviations fail by chance once in 250,000 runs.
    assert float((counts[~mask.flatten()] - draws * p).abs().max()) < 5 * (draws * p * (1 - p)) ** 0.5


def test_the_best_free_positions_of_visible_scores() -> None:
    scores = torch.tensor([[9.0, 1, 9], [2, 9, 2], [2, 0, 9]])
    layer = _view(_mask("101", "010", "001"))
    for count, positions in ((1, [3]), (2, [3, 5]), (3, [3, 5, 6]), (4, [1, 3, 5, 6]), (5, [1, 3, 5, 6, 7])):
        assert layer.best_free(lambda first, last: scores[first:last], count).tolist() == positions
    assert int(scores.sum()) == 43, "scores that a rule hands out are not written into"


@pytest.mark.parametrize("block_entries", [1, 7, 40, 2**18])
@given(seed=st.integers(0, 999), levels=st.integers(1, 9), share_of_free=st.floats(0, 1))
def test_the_best_free_positions_do_not_depend_on_the_blocks(
    block_entries: int, seed: int, levels: int, share_of_free: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(9, 8, generator=generator) < 0.3
    scores = torch.randint(levels, (9, 8), generator=generator).double()
    free = (~mask).flatten().nonzero().squeeze(1)
    count = int(share_of_free * len(free))
    order = torch.sort(scores.flatten()[free], descending=True, stable=True).indices[:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("offpath.topology.select.BLOCK_ENTRIES", block_entries)
        found = _view(mask).best_free(lambda first, last: scores[first:last], count)
    assert torch.equal(found, free[order].sort().values)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.full((2, 3), torch.nan), "finite scores"),
        (torch.tensor([[0, torch.inf, 0], [0, 0, 0]]), "finite scores"),
        (torch.zeros(2, 2), r"floating scores of shape \(2, 3\)"),
        (torch.zeros(2, 3, dtype=torch.int64), "floating scores"),
        (torch.full((2, 3), -torch.inf), "only 0 can be grown"),
    ],
)
def test_scores_that_say_nothing_are_refused(scores: Tensor, message: str) -> None:
    with pytest.raises(TopologyError, match=f"layer 'layer'.*{message}"):
        _view(_mask("100", "010")).best_free(lambda first, last: scores, 2)


def test_importances_of_the_drop_rules() -> None:
    layer = _view(_mask("111"), torch.tensor([-3.0, 1.0, -2.0]), gradient=torch.tensor([0.0, -4.0, 1.0]))
    assert drop.magnitude(layer).tolist() == [3, 1, 2]
    assert drop.Threshold(2.5)(layer).tolist() == [torch.inf, 1, 2]
    assert drop.MagnitudeAndGradient()(layer).tolist() == [3, 5, 3]
    assert drop.MagnitudeAndGradient(0.5)(layer).tolist() == [3, 3, 2.5]
    first, second = drop.random(layer), drop.random(layer)
    assert first.shape == (3,) and not torch.equal(first, second)
    assert torch.equal(first, drop.random(_view(_mask("111"))))


def test_gradient_growth_takes_the_largest_of_the_dense_gradient() -> None:
    x, dy = torch.tensor([[1.0, 2, 3]]), torch.tensor([[1.0, -5]])
    layer = _view(_mask("100", "001"), passes=(Pass(x, dy),))  # the dense gradient is [[1, 2, 3], [-5, -10, -15]]
    assert grow.Gradient()(layer, 2).tolist() == [3, 4]
    assert grow.Gradient()(layer, 3).tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("schedule", "due"),
    [
        (Every(3), [3, 6, 9]),
        (Every(3, end_step=9), [3, 6]),
        (Every(3, end_step=9, at_end=True), [3, 6, 9]),
        (Every(3, end_step=8, at_end=True), [3, 6, 8]),
        (Every(3, end_step=9, start_step=2), [2, 5, 8]),
        (Every(100), []),
    ],
)
def test_due_steps(schedule: Every, due: list[int]) -> None:
    assert [step for step in range(11) if schedule.due(step)] == due


def test_fractions_over_time() -> None:
    assert Constant(0.3)(5) == 0.3
    assert Cosine(0.3, 100)(0) == 0.3 and Cosine(0.3, 100)(100) == 0 == Cosine(0.3, 100)(200)
    assert [Cubic(10, start_step=2)(step) for step in (0, 2, 6, 10, 12)] == [1, 1, 0.125, 0, 0]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=6), st.data())
def test_shares_add_up_and_fit(layers: list[tuple[int, int]], data: st.DataObject) -> None:
    weights, room = [list(column) for column in zip(*layers, strict=True)]
    total = data.draw(st.integers(0, sum(room)))
    shares = share(total, weights, room)
    assert sum(shares) == total and all(0 <= s <= r for s, r in zip(shares, room, strict=True))
    with pytest.raises(TopologyError, match="room for"):
        share(sum(room) + 1, weights, room)


@pytest.mark.parametrize(
    ("weights", "room", "shares"), [([1, 1], [9, 9], [3, 2]), ([4, 1], [9, 9], [4, 1]), ([0, 0], [2, 9], [2, 3])]
)
def test_shares_of_five(weights: list[int], room: list[int], shares: list[int]) -> None:
    assert share(5, weights, room) == shares
