"""The definition of every product and selection on sparse rows, in plain torch: any device, any floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from offpath.kernels.backend import KernelError
from offpath.kernels.operands import in_own_dtype, row_numbers, wide
from offpath.kernels.row_products import RowProducts


def matmul(crow_indices: Tensor, indices: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """y[b] = sum over the entries of row b of value * weight[index].

    >>> import torch
    >>> crow_indices, indices = torch.tensor([0, 2, 3]).int(), torch.tensor([0, 2, 1]).int()
    >>> matmul(crow_indices, indices, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0], [10.0], [100.0]]))
    tensor([[201.],
            [ 30.]])
    """
    check_rows(crow_indices, indices, weight.shape[0])
    products = wide(values)[:, None] * wide(weight)[indices.long()]
    y = products.new_zeros(crow_indices.numel() - 1, weight.shape[1])
    return y.index_add(0, row_numbers(crow_indices), products).to(values.dtype)


def dots(crow_indices: Tensor, indices: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """<dy[b], weight[index]> for each entry of row b."""
    check_rows(crow_indices, indices, weight.shape[0])
    return (wide(dy)[row_numbers(crow_indices)] * wide(weight)[indices.long()]).sum(1).to(dy.dtype)


def weight_gradient(crow_indices: Tensor, indices: Tensor, values: Tensor, dy: Tensor, columns: int) -> Tensor:
    """Row i is the sum over the entries at i of value * dy[row of the entry]."""
    check_rows(crow_indices, indices, columns)
    products = wide(values)[:, None] * wide(dy)[row_numbers(crow_indices)]
    return products.new_zeros(columns, dy.shape[1]).index_add(0, indices.long(), products).to(values.dtype)


def add_weight_gradient(crow_indices: Tensor, indices: Tensor, values: Tensor, dy: Tensor, buffer: Tensor) -> None:
    """`weight_gradient`, summed with what the buffer holds and rounded once."""
    check_rows(crow_indices, indices, buffer.shape[0])
    products = wide(values)[:, None] * wide(dy)[row_numbers(crow_indices)]
    named = indices.long().unique()
    sums = wide(buffer).index_add(0, indices.long(), products)[named]
    buffer.index_copy_(0, named, sums.to(buffer.dtype))  # nothing else: a NaN of 16 bits changes on the way back


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
    check_rows(crow_indices, indices, w_crow_indices.numel() - 1)
    entries, slots = _meetings(indices, w_crow_indices)
    y = wide(values).new_zeros(crow_indices.numel() - 1, width)
    places = row_numbers(crow_indices)[entries], w_indices.long()[slots]
    return y.index_put(places, wide(values)[entries] * wide(w_values)[slots], accumulate=True).to(values.dtype)


def sparse_dots(
    crow_indices: Tensor, indices: Tensor, dy: Tensor, w_crow_indices: Tensor, w_indices: Tensor, w_values: Tensor
) -> Tensor:
    """<dy[b], row `index` of the sparse weight> for each entry of row b."""
    check_rows(crow_indices, indices, w_crow_indices.numel() - 1)
    entries, slots = _meetings(indices, w_crow_indices)
    products = wide(dy)[row_numbers(crow_indices)[entries], w_indices.long()[slots]] * wide(w_values)[slots]
    return products.new_zeros(indices.numel()).index_add(0, entries, products).to(dy.dtype)


def sparse_weight_gradient(
    crow_indices: Tensor, indices: Tensor, values: Tensor, dy: Tensor, w_crow_indices: Tensor, w_indices: Tensor
) -> Tensor:
    """For each connection (i, o) of the sparse weight, the sum over the entries at i of value * dy[row, o]."""
    check_rows(crow_indices, indices, w_crow_indices.numel() - 1)
    entries, slots = _meetings(indices, w_crow_indices)
    products = wide(values)[entries] * wide(dy)[row_numbers(crow_indices)[entries], w_indices.long()[slots]]
    return products.new_zeros(w_indices.numel()).index_add(0, slots, products).to(values.dtype)


def _meetings(indices: Tensor, w_crow_indices: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair (entry, connection of its place)."""
    counts = w_crow_indices.diff().long()[indices.long()]
    entries = torch.arange(indices.numel(), device=indices.device).repeat_interleave(counts)
    first = w_crow_indices.long()[indices.long()] - counts.cumsum(0) + counts
    return entries, torch.arange(entries.numel(), device=indices.device) + first[entries]


def counts(indices: Tensor, columns: int) -> Tensor:
    """How many entries each place has, int32 [columns]."""
    check_indices(indices, columns)
    return torch.bincount(indices, minlength=columns).int()


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, indices) of the k largest entries of each row, ascending in the index; ties go to the lowest index."""
    check_k(k, x.shape[1])
    order = x.sort(dim=1, descending=True, stable=True).indices  # NaN sorts as the largest
    indices = order[:, :k].sort(dim=1).values
    return x.gather(1, indices), indices.int()


def batch_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(crow_indices, indices, values) of the k largest entries of all of x; ties go to the first in row-major order."""
    check_k(k, x.numel())
    flat = x.flatten().sort(descending=True, stable=True).indices[:k].sort().values
    live = torch.zeros_like(x, dtype=torch.bool).flatten().index_fill(0, flat, True).view(x.shape)
    return (*_rows_of(live), x.flatten()[flat])


def above(x: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(crow_indices, indices, values) of the entries that are larger than their column's threshold, or NaN.

    Without a threshold, of the entries that are not zero.
    """
    live = x != 0 if threshold is None else ~(x <= threshold)
    return (*_rows_of(live), x[live])


def encode_topk(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """`topk(x @ weight.T + bias, k)`, the scores in the type of the sums."""
    with in_own_dtype(x):
        scores = torch.nn.functional.linear(wide(x), wide(weight), None if bias is None else wide(bias))
    values, indices = topk(scores, k)
    return values.to(x.dtype), indices


def encoder_gradients(
    crow_indices: Tensor, indices: Tensor, values: Tensor, dy: Tensor, columns: int
) -> tuple[Tensor, Tensor]:
    """(`weight_gradient`, the sum of the values at each column)."""
    of_weight = weight_gradient(crow_indices, indices, values, dy, columns)
    sums = wide(values).new_zeros(columns).index_add(0, indices.long(), wide(values))
    return of_weight, sums.to(values.dtype)


def written_out(crow_indices: Tensor, indices: Tensor, values: Tensor, columns: int) -> Tensor:
    """The rows with their zeros, [rows, columns]; entries at one place add up."""
    check_rows(crow_indices, indices, columns)
    places = row_numbers(crow_indices), indices.long()
    dense = wide(values).new_zeros(crow_indices.numel() - 1, columns)
    return dense.index_put(places, wide(values), accumulate=True).to(values.dtype)


def dense_dots(crow_indices: Tensor, indices: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """`dots` from all products of a row of dy and one of the weight."""
    check_rows(crow_indices, indices, weight.shape[0])
    with in_own_dtype(dy):
        products = dy @ weight.t()
    return products[row_numbers(crow_indices), indices.long()]


def check_indices(indices: Tensor, columns: int) -> None:
    """Raises `KernelError` unless every index is in [0, columns)."""
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= columns):
        raise KernelError(
            f"expected indices in [0, {columns}), got {int(indices.min())} to {int(indices.max())}; "
            "an index names a row of the weight"
        )


def check_rows(crow_indices: Tensor, indices: Tensor, columns: int) -> None:
    """Raises `KernelError` for indices out of range, and for rows that do not follow one another."""
    check_indices(indices, columns)
    check_pointer(crow_indices, indices.numel())


def check_pointer(crow_indices: Tensor, nnz: int) -> None:
    """Raises `KernelError` for rows that do not follow one another, from the first of `nnz` entries to the last."""
    # Compared and not subtracted: a difference may be more than an int32.
    if crow_indices[0] != 0 or crow_indices[-1] != nnz or bool((crow_indices[1:] < crow_indices[:-1]).any()):
        raise KernelError(f"expected crow_indices to rise from 0 to the number of entries, {nnz}, got {crow_indices}")


def check_k(k: int, most: int) -> None:
    """Raises `KernelError` unless k entries can be chosen."""
    if not 0 <= k <= most:
        raise KernelError(f"expected k of at most the {most} entries to choose from, and at least 0, got {k}")


def _rows_of(live: Tensor) -> tuple[Tensor, Tensor]:
    crow_indices = torch.zeros(live.shape[0] + 1, dtype=torch.int32, device=live.device)
    crow_indices[1:] = live.sum(1).cumsum(0)
    return crow_indices, live.nonzero()[:, 1].int()


ROWS = RowProducts(
    matmul,
    dots,
    weight_gradient,
    add_weight_gradient,
    sparse_matmul,
    sparse_dots,
    sparse_weight_gradient,
    counts,
    topk,
    batch_topk,
    above,
    encode_topk,
    written_out,
    dense_dots,
    encoder_gradients,
)
