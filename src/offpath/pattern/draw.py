"""Drawing distinct numbers without listing all that could be drawn."""

from __future__ import annotations

import torch
from torch import Tensor


def distinct(upper: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` distinct integers in [0, upper), ascending int64 on the CPU, every such set equally likely.

    Takes O(count) memory however large `upper` is. Raises `ValueError` when there are fewer than `count`.

    >>> distinct(2**40, 3, torch.Generator().manual_seed(0)).numel()
    3
    """
    if not 0 <= count <= upper:
        raise ValueError(f"expected to draw between 0 and {upper} distinct numbers, got {count}")
    if count <= upper // 2:
        return _few(upper, count, generator)
    # Rejection would draw for ever where nearly all are wanted; there the ones left out are the few.
    present = torch.ones(upper, dtype=torch.bool, device="cpu")
    present[_few(upper, upper - count, generator)] = False
    return present.nonzero().squeeze(1)


def _few(upper: int, count: int, generator: torch.Generator | None) -> Tensor:
    chosen = torch.empty(0, dtype=torch.int64, device="cpu")
    while chosen.numel() < count:
        # A draw collides with probability <= 1/2, so a few rounds suffice.
        missing = count - chosen.numel()
        drawn = torch.randint(upper, (missing + missing // 8 + 16,), generator=generator, device="cpu")
        chosen = torch.cat([chosen, drawn]).unique()
    surplus = chosen.numel() - count
    if surplus:
        # Which ones go must not depend on their size, or large positions would be rarer.
        keep = torch.ones(chosen.numel(), dtype=torch.bool, device="cpu")
        keep[torch.randperm(chosen.numel(), generator=generator, device="cpu")[:surplus]] = False
        chosen = chosen[keep]
    return chosen
