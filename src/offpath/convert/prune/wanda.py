"""Wanda: a weight counts as much as it moves the output on the calibration data."""

from __future__ import annotations

from torch import Tensor


def scores(weight: Tensor, norms: Tensor) -> Tensor:
    """|W_ij| ||X_j||, [groups, rows, columns] in float64, of weights and norms [groups, columns].

    Sun et al., "A simple and effective pruning approach for large language models", 2023, equation (1).

    >>> import torch
    >>> scores(torch.tensor([[[3.0, -1.0]]]), torch.tensor([[1.0, 4.0]]).double())
    tensor([[[3., 4.]]], dtype=torch.float64)
    """
    return weight.double().abs() * norms.unsqueeze(1)
