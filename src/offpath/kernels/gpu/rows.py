"""The products of sparse rows with a sparse weight, by those with a dense one: the weight is written out for each."""

from __future__ import annotations

from torch import Tensor

from offpath.kernels.gpu import densely, gather, selection
from offpath.kernels.gpu.counting_sort import (
    add_weight_gradient,
    counts,
    encoder_gradients,
    row_gradients,
    weight_gradient,
)
from offpath.kernels.operands import row_numbers
from offpath.kernels.row_products import RowProducts


def sparse_matmul(
    crow_indices: Tensor,
    indices: Tensor,
    values: Tensor,
    w_crow_indices: Tensor,
    w_indices: Tensor,
    w_values: Tensor,
    width: int,
) -> Tensor:
    """y[b] = sum over the entries of row b of value * (row `index` of the sparse weight)."""
    return gather.matmul(crow_indices, indices, values, _written_out(w_crow_indices, w_indices, w_values, width))


def sparse_dots(
    crow_indices: Tensor, indices: Tensor, dy: Tensor, w_crow_indices: Tensor, w_indices: Tensor, w_values: Tensor
) -> Tensor:
    """<dy[b], row `index` of the sparse weight> for each entry of row b."""
    weight = _written_out(w_crow_indices, w_indices, w_values, dy.shape[1])
    return gather.dots(crow_indices, indices, dy, weight)


def sparse_weight_gradient(
    crow_indices: Tensor, indices: Tensor, values: Tensor, dy: Tensor, w_crow_indices: Tensor, w_indices: Tensor
) -> Tensor:
    """For each connection (i, o) of the sparse weight, the sum over the entries at i of value * dy[row, o]."""
    columns = w_crow_indices.shape[0] - 1
    gradient = weight_gradient(crow_indices, indices, values, dy, columns)
    return gradient.reshape(-1)[_places(w_crow_indices, w_indices, dy.shape[1])]


def _written_out(crow_indices: Tensor, indices: Tensor, values: Tensor, width: int) -> Tensor:
    dense = values.new_zeros((crow_indices.shape[0] - 1) * width)
    places = _places(crow_indices, indices, width)
    return dense.index_put_((places,), values).view(crow_indices.shape[0] - 1, width)


def _places(crow_indices: Tensor, indices: Tensor, width: int) -> Tensor:
    return row_numbers(crow_indices, indices.shape[0]) * width + indices


ROWS = RowProducts(
    gather.matmul,
    gather.dots,
    weight_gradient,
    add_weight_gradient,
    sparse_matmul,
    sparse_dots,
    sparse_weight_gradient,
    counts,
    selection.topk,
    selection.batch_topk,
    selection.above,
    selection.encode_topk,
    densely.written_out,
    densely.dense_dots,
    encoder_gradients,
    row_gradients,
)
