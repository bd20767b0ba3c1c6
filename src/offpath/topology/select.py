"""The lowest and the highest of many scores, as a pure function of the scores: ties go to the lower index."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from offpath.pattern import Pattern
from offpath.topology.errors import TopologyError

# Scores of a block of rows: 1 MiB in float32, which stays in the second-level cache.
BLOCK_ENTRIES = 2**18
SAMPLE_ENTRIES = 2**12
# Scores of all positions of the rows [first, last): a floating tensor [last - first, in_features].
ScoreRows = Callable[[int, int], Tensor]


def lowest(scores: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` lowest of `scores` [n]; among equals, those of lower index. No NaN.

    >>> lowest(torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0]), 2).tolist()
    [1, 3]
    """
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    threshold = _kth_lowest(scores, count)
    chosen = scores < threshold
    ties = (scores == threshold).nonzero().squeeze(1)
    chosen.index_fill_(0, ties[: count - int(chosen.sum())], True)
    return chosen.nonzero().squeeze(1)


def _kth_lowest(scores: Tensor, count: int) -> Tensor:
    """The `count`-th lowest; a sample says between which two scores it lies, so that few have to be ranked."""
    stride = scores.numel() // SAMPLE_ENTRIES
    if stride > 4:
        sample = scores[::stride].sort().values
        # The rank in a random sample has a standard deviation of at most sqrt(n) / 2: here are four on either side. A
        # sample that misleads, of scores that follow the stride, costs time and nothing else.
        rank, margin = count / stride, 2 * sample.numel() ** 0.5
        low, high = (sample[min(max(int(at), 0), sample.numel() - 1)] for at in (rank - margin, rank + margin))
        rank_between = count - int((scores < low).sum())
        between = scores[(scores >= low) & (scores <= high)]
        if 1 <= rank_between <= between.numel():
            return low if bool(low == high) else torch.kthvalue(between, rank_between).values
    return torch.kthvalue(scores, count).values


def highest(scores: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` highest of `scores` [n]; among equals, those of lower index. No NaN."""
    return lowest(-scores, count)


def best_free(name: str, pattern: Pattern, positions: Tensor, scores_of_rows: ScoreRows, count: int) -> Tensor:
    """Ascending positions of the `count` highest scores that are no connections; among equals, the lower positions.

    `positions` are those of the connections. Scores are asked for in blocks of rows and only `count` of them kept:
    O(count + block) memory. A score of -inf says never. Raises `TopologyError`, which names the layer, for NaN or inf,
    for a block of another shape, and when fewer than `count` positions can be grown.
    """
    rows, columns = pattern.shape
    block_rows = max(1, BLOCK_ENTRIES // max(columns, 1))
    bounds = [*range(0, rows, block_rows), rows] if count else []
    slots = pattern.crow_indices[bounds].tolist()
    found, floor = _Found(pattern.device), -torch.inf
    for block_index, (first, last) in enumerate(pairwise(bounds)):
        block = scores_of_rows(first, last)
        _check_block(name, block, (last - first, columns))
        block = block.reshape(-1).clone()
        block[positions[slots[block_index] : slots[block_index + 1]] - first * columns] = -torch.inf
        # A later position loses against an equal one that was found before: strictly greater is enough.
        candidates = (block > floor).nonzero().squeeze(1)
        found.add(candidates + first * columns, block.index_select(0, candidates))
        if found.count > 2 * count:  # not in every block: a selection costs as much as the scores
            floor = found.keep_highest(count)
    if found.count < count:
        raise TopologyError(
            f"layer {name!r}: expected {count} free positions to grow, but only {found.count} can be grown"
        )
    if found.count > count:
        found.keep_highest(count)
    return found.positions


class _Found:
    """Candidates of the blocks so far, in ascending position."""

    def __init__(self, device: torch.device) -> None:
        self.positions = torch.empty(0, dtype=torch.int64, device=device)
        self._scores: Tensor | None = None

    @property
    def count(self) -> int:
        return self.positions.numel()

    def add(self, positions: Tensor, scores: Tensor) -> None:
        self.positions = torch.cat([self.positions, positions])
        self._scores = scores if self._scores is None else torch.cat([self._scores, scores])

    def keep_highest(self, count: int) -> float:
        """Forget all but `count`; returns the lowest score that is left."""
        assert self._scores is not None
        kept = highest(self._scores, count)
        self.positions, self._scores = self.positions.index_select(0, kept), self._scores.index_select(0, kept)
        return float(self._scores.min())


def _check_block(name: str, block: Tensor, shape: tuple[int, int]) -> None:
    if tuple(block.shape) != shape or not block.is_floating_point():
        raise TopologyError(
            f"layer {name!r}: expected floating scores of shape {shape}, got {block.dtype} {tuple(block.shape)}"
        )
    # The largest entry shows NaN and inf at the price of one pass.
    if block.numel() and not bool(block.amax() < torch.inf):
        raise TopologyError(
            f"layer {name!r}: expected finite scores, got NaN or inf; activations, gradients or the rule overflowed. "
            "After a step that a gradient scaler skipped, call topology.forget() in place of step()"
        )
