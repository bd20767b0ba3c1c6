"""Rows of a matrix as int8 with one scale each."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127


def quantise_rows(weights: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(values int8, scales float32 [count]) with weights[s] within scales[r] / 2 of scales[r] * values[s].

    `rows` holds the row of each entry of `weights` [nnz]. scales[r] = max |weights of r| / 127, at least the smallest
    normal float32; to the nearest, ties to even. Raises `ValueError` for weights that no scale can hold.

    >>> quantise_rows(torch.tensor([2.54, 1.0, 0.0]), torch.tensor([0, 0, 1]), 2)[0]
    tensor([127,  50,   0], dtype=torch.int8)
    """
    weights = weights.double()
    largest = weights.new_zeros(count).scatter_reduce_(0, rows, weights.abs(), "amax")
    scales = (largest / LARGEST).float().clamp_(min=torch.finfo(torch.float32).tiny)
    bad = ~(scales * LARGEST).isfinite()  # what the largest is read back as
    if bool(bad.any()):
        raise ValueError(
            "expected finite weights within float32 to quantise, got NaN, infinite or larger ones in "
            f"{int(bad.sum())} rows, the first of which is row {int(bad.nonzero()[0])}"
        )
    # Rounding the scale to float32 can make a quotient larger than 127 by a few millionths: it still rounds to 127.
    return (weights / scales.double()[rows]).round().to(torch.int8), scales
