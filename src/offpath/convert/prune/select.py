"""Keeping exactly so many of the largest scores; of equal ones, those at lower positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

# A threshold over many layers is found 16 bits at a time, in blocks of so many scores.
DIGIT_BITS = 16
BLOCK = 1 << 20


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Which `count` scores of each row of `scores` [rows, columns] are its largest, as a bool tensor.

    >>> keep_largest(torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]]), 2)
    tensor([[ True, False,  True],
            [ True,  True, False]])
    """
    columns = scores.shape[1]
    if count == 0 or count == columns:
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    threshold = scores.kthvalue(columns - count + 1, dim=1, keepdim=True).values
    keep = scores >= threshold
    surplus = keep.sum(1, keepdim=True) - count
    if bool(surplus.any()):
        ties = scores == threshold
        from_the_end = ties.flip(1).cumsum(1).flip(1)
        keep &= ~(ties & (from_the_end <= surplus))
    return keep


def keep_largest_of_all(scores: Sequence[Callable[[], Tensor]], count: int) -> Iterator[Tensor]:
    """The same over all layers at once: which of the scores that each function returns are among the `count` largest.

    Each function is called several times and must return the same each time, all in one dtype, float32 or float64,
    and none below zero. So the scores of one layer at a time are in memory, and the counts are exact.

    >>> first, second = torch.tensor([1.0, 5.0]), torch.tensor([4.0, 3.0])
    >>> list(keep_largest_of_all([lambda: first, lambda: second], 2))
    [tensor([False,  True]), tensor([ True, False])]
    """
    threshold, ties_left = _threshold(scores, count)
    for score in scores:
        bits = _bits(score())
        keep = bits > threshold
        ties = bits == threshold
        here = min(int(ties.sum()), ties_left)
        ties_left -= here
        if here:
            positions = ties.flatten().nonzero().flatten()[:here]
            keep.view(-1)[positions] = True
        yield keep


def _bits(scores: Tensor) -> Tensor:
    # Numbers from zero on are ordered as their bits are.
    return scores.contiguous().view(torch.int64 if scores.dtype == torch.float64 else torch.int32)


def _threshold(scores: Sequence[Callable[[], Tensor]], count: int) -> tuple[int, int]:
    """The bits of the `count`-th largest score, and how many of those equal to it belong to the `count` largest."""
    bits = 64 if scores[0]().dtype == torch.float64 else 32
    prefix, remaining = 0, max(count, 1)
    for shift in range(bits - DIGIT_BITS, -1, -DIGIT_BITS):
        histogram = np.zeros(1 << DIGIT_BITS, dtype=np.int64)
        for score in scores:
            histogram += _histogram(score(), prefix, shift)
        at_least = np.cumsum(histogram[::-1])[::-1]
        digit = int((at_least >= remaining).sum()) - 1  # the largest that enough scores reach
        remaining -= int(at_least[digit] - histogram[digit])
        prefix = (prefix << DIGIT_BITS) | digit
    return (prefix, remaining) if count else (prefix, 0)


def _histogram(scores: Tensor, prefix: int, shift: int) -> np.ndarray:
    """How many scores whose bits above `shift` + 16 are `prefix` have each value of the next 16 bits."""
    counts = np.zeros(1 << DIGIT_BITS, dtype=np.int64)
    for block in _bits(scores).flatten().split(BLOCK):
        digits = block >> shift
        if shift + DIGIT_BITS < 8 * block.element_size():  # not the top digit
            digits = digits[digits >> DIGIT_BITS == prefix] & ((1 << DIGIT_BITS) - 1)
        counts += torch.bincount(digits, minlength=1 << DIGIT_BITS).cpu().numpy()
    return counts
