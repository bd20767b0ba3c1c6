"""SparseGPT: what a pruned weight contributed is put on the weights to its right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offpath.convert.prune.select import keep_largest


class SingularHessianError(ValueError):
    """A Hessian has no Cholesky factor in float64: it needs more dampening or more calibration data."""


@dataclass(frozen=True)
class Inverse:
    """What layers that read the same inputs need of their Hessian.

    `factor` [groups, columns, columns] is U, upper triangular, with H^-1 = U^T U; `dead` [groups, columns] are the
    inputs that were always zero.
    """

    factor: Tensor
    dead: Tensor


def invert(hessian: Tensor, dampening: float) -> Inverse:
    """Factor the inverse of `hessian` [groups, columns, columns], which is written over.

    `dampening` times the mean of its diagonal is added to the diagonal; a dead input's entry is that mean, too.
    H = R R^T with R upper triangular is the usual Cholesky factorization with rows and columns reversed, and U is the
    inverse of R: H^-1 itself is never computed. Raises `SingularHessianError`.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    mean = diagonal.sum(1, keepdim=True) / (~dead).sum(1, keepdim=True).clamp(min=1)
    mean = mean.masked_fill(mean == 0, 1)
    diagonal += torch.where(dead, mean, 0.0) + dampening * mean
    lower, info = torch.linalg.cholesky_ex(hessian.flip(1, 2))
    if bool(info.any()):
        raise SingularHessianError
    identity = torch.eye(hessian.shape[1], dtype=hessian.dtype, device=hessian.device)
    factor = torch.linalg.solve_triangular(lower.flip(1, 2), identity.expand_as(hessian), upper=True)
    return Inverse(factor, dead)


def solve(weight: Tensor, inverse: Inverse, nnz: int, blocksize: int) -> Tensor:
    """Weights [groups, rows, columns] in float64 of which `nnz` are left, adapted so that outputs change little.

    Frantar & Alistarh, "SparseGPT: massive language models can be accurately pruned in one-shot", 2023, algorithm 1.
    From the left, each block of `blocksize` columns loses the weights that cost least, (w / U_cc)^2, as many as make
    up its share; the error of each column is moved to the columns right of it. Dead inputs lose all their weights.
    """
    # Transposed, so that what a step works on lies together.
    weight = weight.mT.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    weight.masked_fill_(inverse.dead.unsqueeze(2), 0)
    columns = weight.shape[1]
    for start in range(0, columns, blocksize):
        end = min(start + blocksize, columns)
        block = weight[:, start:end]
        factor = inverse.factor[:, start:end, start:end]
        costs = (block / factor.diagonal(dim1=1, dim2=2).unsqueeze(2)).square()
        share = round(nnz * end / columns) - round(nnz * start / columns)
        keep = keep_largest(costs.reshape(1, -1), share).view_as(costs)
        errors = torch.empty_like(block)
        for column in range(end - start):
            error = torch.div(block[:, column], factor[:, column, column].unsqueeze(1), out=errors[:, column])
            error.masked_fill_(keep[:, column], 0)
            block[:, column:].baddbmm_(factor[:, column, column:].unsqueeze(2), error.unsqueeze(1), alpha=-1)
        block.masked_fill_(~keep, 0)
        weight[:, end:].baddbmm_(inverse.factor[:, start:end, end:].mT, errors, alpha=-1)
    return weight.mT
