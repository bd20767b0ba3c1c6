"""Encoders that choose among the pre-activations of some rows at a time: a large batch never has all of its stored.

On a CPU these are few rows. A GPU takes many, and is asked as little as possible: `encode_above` waits for the device
once for each block, as it has to know how many entries there are, and `encode_batch_topk` once in all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from offpath.ops import SparseRows, above, batch_topk
from offpath.ops.library import is_transforming
from offpath.ops.selection import gradients_of_encoder, row_numbers as row_numbers_of, tangent_of_encoder
from offpath.ops.transformable import in_both_modes

# Pre-activations of one block: few enough for 16 MiB in float32, enough for a product at full speed.
BLOCK_ENTRIES = 2**22
# On a GPU, whose caches hold no block that is worth a wait: 1 GiB in float32.
DEVICE_BLOCK_ENTRIES = 2**28


def encode_above(x: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor) -> SparseRows:
    """The entries of `x @ weight.T + bias` that are larger than the `threshold` [latents] of their column, or NaN.

    `x` [rows, width], `weight` [latents, width] and `bias` [latents] get their gradients, the threshold gets none. It
    may be of a wider dtype than they are.

    >>> encode_above(torch.tensor([[2.0]]), torch.tensor([[1.0], [-1.0]]), torch.zeros(2), torch.zeros(2)).values
    tensor([2.])
    """
    found = [above(scores, threshold) for _, scores in _blocks(x, weight, bias)]
    if not found:
        found = [above(x.new_empty(0, weight.shape[0]), threshold)]
    crow_indices = functional.pad(torch.cat([rows.crow_indices.diff() for rows in found]).cumsum(0), (1, 0)).int()
    indices, values = (torch.cat([getattr(rows, part) for rows in found]) for part in ("indices", "values"))
    return _with_gradient(x, weight, bias, crow_indices, indices, values)


def encode_batch_topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> SparseRows:
    """The positive ones (and NaN) among the k largest entries of all of `x @ weight.T + bias`.

    Of equal entries the first in row-major order are chosen. `x` [rows, width], `weight` [latents, width] and `bias`
    [latents] get their gradients (Bussmann et al., "BatchTopK Sparse Autoencoders", 2024).

    >>> x, weight = torch.tensor([[1.0], [5.0]]), torch.tensor([[1.0], [3.0]])
    >>> encode_batch_topk(x, weight, torch.zeros(2), 2).to_dense()
    tensor([[ 0.,  0.],
            [ 5., 15.]])
    """
    choose = _best_on_device if _is_on_device(x) else _best_of_small_blocks
    row_numbers, indices, values = choose(x, weight, bias, k)
    bounds = torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device)
    crow_indices = torch.searchsorted(row_numbers, bounds, out_int32=True)
    return _with_gradient(x, weight, bias, crow_indices, indices, values)


def _best_of_small_blocks(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row numbers, indices, values) of the best: of a block, those are looked at that may be among them."""
    row_numbers, indices = (x.new_empty(0, dtype=torch.int32) for _ in range(2))
    values, floor = x.new_empty(0), 0.0
    for first, scores in _blocks(x, weight, bias):
        found = above(scores, floor)
        row_numbers = torch.cat([row_numbers, _numbers(found) + first])
        indices, values = torch.cat([indices, found.indices]), torch.cat([values, found.values])
        if len(values) > k:
            # Later entries have to be larger than the least of these: an equal one comes after it in row-major order.
            best = batch_topk(values[None], k).indices.long()
            row_numbers, indices, values = row_numbers[best], indices[best], values[best]
            floor = float(values.nan_to_num(nan=torch.inf).min()) if k else torch.inf
    return row_numbers, indices, values


def _best_on_device(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same: as many of each block as there may be in all, so that only the end has to be waited for."""
    row_numbers, indices = (x.new_empty(0, dtype=torch.int32) for _ in range(2))
    values = x.new_empty(0)
    for first, scores in _blocks(x, weight, bias):
        found = batch_topk(scores, min(k, scores.numel()))
        row_numbers = torch.cat([row_numbers, _numbers(found) + first])
        indices, values = torch.cat([indices, found.indices]), torch.cat([values, found.values])
        if len(values) > k:
            best = batch_topk(values[None], k).indices.long()
            row_numbers, indices, values = row_numbers[best], indices[best], values[best]
    live = (~(values <= 0)).nonzero()[:, 0]
    return row_numbers[live], indices[live], values[live]


def _numbers(found: SparseRows) -> Tensor:
    """`row_indices` of what a selection found: a GPU is not waited for to check it."""
    return row_numbers_of(found.crow_indices, found.nnz).int()


def _is_on_device(x: Tensor) -> bool:
    """Whether what computes works on while Python goes on, and is slowed down by whoever asks for a result."""
    return not x.is_cpu


def _blocks(x: Tensor, weight: Tensor, bias: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, pre-activations) of each block of rows, without a history; the next block overwrites them."""
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    entries = DEVICE_BLOCK_ENTRIES if _is_on_device(x) else BLOCK_ENTRIES
    rows = max(1, entries // max(1, weight.shape[0]))
    # One buffer for all blocks: what is kept of a block would lie between a buffer of its own and the next one's, and
    # the memory that is freed so need not be large enough for it.
    scores = x.new_empty(min(rows, x.shape[0]), weight.shape[0])
    for first in range(0, x.shape[0], rows):
        operands = bias, x[first : first + rows], weight.T
        if not torch.compiler.is_compiling() and is_transforming():  # torch.func.vmap writes into nothing
            yield first, torch.addmm(*operands)
        else:
            yield first, torch.addmm(*operands, out=scores[: x.shape[0] - first])


def _with_gradient(
    x: Tensor, weight: Tensor, bias: Tensor, crow_indices: Tensor, indices: Tensor, values: Tensor
) -> SparseRows:
    return SparseRows(crow_indices, indices, _encoded(values, crow_indices, indices, x, weight, bias), weight.shape[0])


class _Encoded:
    """Entries of x @ weight.T + bias that have been computed, with the gradients of x, weight and bias at them."""

    @staticmethod
    def compute(values, crow_indices, indices, x, weight, bias):
        return values.clone()  # what is given back as it came is a view to autograd, and refuses in-place functions

    @staticmethod
    def saved(ctx, values, crow_indices, indices, x, weight, bias):
        return crow_indices, indices, x, weight

    @staticmethod
    def backward(ctx, dvalues):
        crow_indices, indices, x, weight = ctx.saved_tensors
        operands = dvalues.contiguous(), crow_indices, indices, x, weight, weight.shape[0]
        return None, None, None, *gradients_of_encoder(*operands, ctx.needs_input_grad[3:])

    @staticmethod
    def jvp_rule(ctx, saved, of_values, of_crow_indices, of_indices, *tangents):
        crow_indices, indices, x, weight = saved
        return tangent_of_encoder(crow_indices, indices, x, weight, tangents)


_encoded = in_both_modes(_Encoded)
