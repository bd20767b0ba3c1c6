"""Wanda and SparseGPT straight from their papers, in float64 and without a Cholesky factor, for small layers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

U64 = 2.0**-53


def wanda(weight: np.ndarray, x: np.ndarray, kept: int) -> np.ndarray:
    """Sun et al., 2023, equation (1): each row keeps its `kept` largest |W_ij| ||X_j||_2. `x` is [tokens, in]."""
    pruned = np.zeros_like(weight)
    for i in range(weight.shape[0]):
        importance = [abs(weight[i, j]) * np.sqrt(sum(v * v for v in x[:, j])) for j in range(weight.shape[1])]
        for j in sorted(range(weight.shape[1]), key=lambda j: -importance[j])[:kept]:
            pruned[i, j] = weight[i, j]
    return pruned


def hessian(x: np.ndarray, dampening: float) -> np.ndarray:
    """2 / n X X^T with a share of the mean diagonal on it; inputs that are always zero get a diagonal entry."""
    h = 2 / len(x) * x.T @ x
    dead = np.diag(h) == 0
    mean = np.diag(h)[~dead].mean()
    return h + np.diag(dampening * mean + np.where(dead, mean, 0))


def sparsegpt(weight: np.ndarray, x: np.ndarray, kept: int, blocksize: int, dampening: float) -> np.ndarray:
    """Frantar & Alistarh, 2023: equations (2) and (3), with the inverse of what is left of H anew for each column."""
    h, w = hessian(x, dampening), weight.copy()
    w[:, ~x.any(0)] = 0
    columns = w.shape[1]
    inverse = [np.linalg.inv(h[j:, j:]) for j in range(columns)]
    for start in range(0, columns, blocksize):
        end = min(start + blocksize, columns)
        cost = w[:, start:end] ** 2 / [inverse[j][0, 0] for j in range(start, end)]
        share = round(kept * end / columns) - round(kept * start / columns)
        keep = np.zeros(cost.size, dtype=bool)
        keep[np.argsort(-cost, axis=None, kind="stable")[:share]] = True
        keep = keep.reshape(cost.shape)
        for j in range(start, end):
            error = np.where(keep[:, j - start], 0, w[:, j] / inverse[j][0, 0])
            w[:, j:] -= np.outer(error, inverse[j][0])
            w[~keep[:, j - start], j] = 0
    return w


def sparsegpt_bound(x: np.ndarray, dampening: float, weight: np.ndarray) -> float:
    """How far two float64 computations of it may lie apart.

    Inverting an n x n matrix costs a relative error of at most n^2 cond(H) u by Gaussian elimination as by Cholesky
    (Higham, "Accuracy and stability of numerical algorithms", 2002, sections 10.1 and 14.1), each weight takes at
    most n updates from it, and there are two computations.
    """
    n = x.shape[1]
    return 2 * n * n**2 * np.linalg.cond(hessian(x, dampening)) * U64 * float(np.abs(weight).max())


def patches(conv: nn.Module, x: Tensor) -> Tensor:
    """What the weight matrix of a convolution meets, [groups, patches, columns]: kernels with a single one read it."""
    groups, weight = conv.groups, conv.weight
    one = nn.Parameter(torch.zeros(groups, *weight.shape[1:], dtype=x.dtype))
    columns = []
    for position in range(one[0].numel()):
        with torch.no_grad():
            one.zero_().view(groups, -1)[:, position] = 1
            read = conv._conv_forward(x, one, None)
        columns.append(read.transpose(0, 1).reshape(groups, -1))
    return torch.stack(columns, 2)
