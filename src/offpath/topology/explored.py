"""Which positions have ever held a connection."""

from __future__ import annotations

import torch
from torch import Tensor

from offpath.pattern import Pattern


class Explored:
    """One bit for each position of a layer, on the CPU; `count` of them are set.

    Liu et al., "Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse Training",
    2021, whose rate R_s is `count` over all positions.

    >>> from offpath import pattern as patterns
    >>> explored = Explored(patterns.from_mask(torch.eye(3, dtype=torch.bool)))
    >>> explored.add(torch.tensor([1, 4]))  # one of them is there already
    >>> explored.count
    4
    """

    def __init__(self, pattern: Pattern) -> None:
        rows, columns = pattern.shape
        self._bits = torch.zeros((rows * columns + 7) // 8, dtype=torch.uint8, device="cpu")
        self.count = 0
        self.add(pattern.positions())

    def add(self, positions: Tensor) -> None:
        """Set the bits of distinct `positions`, int64."""
        positions = positions.cpu()
        bytes_, masks = positions >> 3, torch.bitwise_left_shift(1, positions & 7).to(torch.uint8)
        new = (self._bits[bytes_] & masks) == 0
        # Distinct bits that are not set: adding is setting.
        self._bits.index_add_(0, bytes_[new], masks[new])
        self.count += int(new.sum())

    def state(self) -> Tensor:
        """The bits, uint8 [positions / 8], the lowest first."""
        return self._bits.clone()

    def load(self, bits: Tensor) -> None:
        """Take the bits of `state`."""
        self._bits = bits.cpu().clone()
        ones = torch.tensor([byte.bit_count() for byte in range(256)], device="cpu")
        self.count = int((torch.bincount(self._bits, minlength=256) * ones).sum())
