"""What a backend computes on sparse rows: activations of which each sample has a few, other ones in every step.

Rows come as `crow_indices` int32 [rows + 1], `indices` int32 [nnz] and `values` [nnz]. Inside a row the indices may
stand in any order and repeat (entries at one place add up); what selects them writes them ascending. `weight`
[columns, width] has a row for each place that an index can name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowProducts:
    """One implementation of every product and selection.

    `matmul(crow_indices, indices, values, weight)`: y[b] = sum over the entries of row b of value * weight[index].
    `dots(crow_indices, indices, dy, weight)`: <dy[b], weight[index]> for each entry: the gradient of the values.
    `weight_gradient(crow_indices, indices, values, dy, columns)`: row i is the sum over the entries at i of
    value * dy[row of the entry].
    `add_weight_gradient(crow_indices, indices, values, dy, buffer)`: the same added to `buffer` [columns, width], whose
    rows without an entry are not touched.
    `gradients(crow_indices, indices, values, dy, weight)`: (`dots`, `weight_gradient`), where both at once are faster.
    `encoder_gradients(crow_indices, indices, values, dy, columns)`: (`weight_gradient`, the sum of the values at each
    column): of weight and bias of a linear layer of which some outputs were chosen.
    `written_out(crow_indices, indices, values, columns)`: the rows with their zeros, [rows, columns].
    `dense_dots(crow_indices, indices, dy, weight)`: `dots` from all products of two rows. Both for rows that are nearly
    full.
    `sparse_matmul(crow_indices, indices, values, w_crow_indices, w_indices, w_values, width)`: `matmul` with a sparse
    weight of that many columns, whose row for each place holds `w_indices` and `w_values`.
    `sparse_dots(crow_indices, indices, dy, w_crow_indices, w_indices, w_values)`: `dots` with a sparse weight.
    `sparse_weight_gradient(crow_indices, indices, values, dy, w_crow_indices, w_indices)`: `weight_gradient` at the
    entries of a sparse weight.
    `counts(indices, columns)`: how many entries each place has, int32 [columns].
    `topk(x, k)`: (values, indices) [rows, k] of the k largest entries of each row of `x` [rows, columns], ascending in
    the index. Of equal ones those with the lowest index; NaN counts as the largest, as in `torch.topk`.
    `batch_topk(x, k)`: (crow_indices, indices, values) of the k largest entries of all of `x`, by the same rules; of
    equal ones those that come first in row-major order.
    `above(x, threshold)`: (crow_indices, indices, values) of the entries that are larger than the `threshold` [columns]
    of their column, or NaN; without a threshold (None), of those that are not zero.
    `encode_topk(x, weight, bias, k)`: `topk(x @ weight.T + bias, k)` for `x` [rows, width], without ever storing that
    product.

    All of them refuse indices out of range, and more than 2^31 - 1 entries. A sparse weight is canonical CSR, which the
    caller has checked.
    """

    matmul: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    dots: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    weight_gradient: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
    add_weight_gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    sparse_matmul: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]
    sparse_dots: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    sparse_weight_gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    counts: Callable[[Tensor, int], Tensor]
    topk: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    batch_topk: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]
    above: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]
    encode_topk: Callable[[Tensor, Tensor, Tensor | None, int], tuple[Tensor, Tensor]]
    written_out: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    dense_dots: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    encoder_gradients: Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
    gradients: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
