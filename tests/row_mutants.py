"""Deliberately wrong products on sparse rows. Each row says which checkers must reject it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from offpath.kernels import KernelError, reference_rows as right
from offpath.kernels.row_products import RowProducts


@dataclass(frozen=True)
class RowMutant:
    name: str
    rows: RowProducts
    rejected_by: tuple[str, ...]


def wrong(name: str, *rejected_by: str, **fields: Callable) -> RowMutant:
    return RowMutant(name, replace(right.ROWS, **fields), rejected_by)


def _without_the_last_entry(crow: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    nnz = max(indices.numel() - 1, 0)
    return crow.clamp(max=nnz), indices[:nnz]


def _drops_the_last_entry(crow, indices, values, weight):
    right.check_rows(crow, indices, weight.shape[0])
    crow, indices = _without_the_last_entry(crow, indices)
    return right.matmul(crow, indices, values[: indices.numel()], weight)


def _off_by_one_row(crow, indices, values, weight):
    return right.matmul(crow, indices, values, weight).roll(1, 0)


def _last_of_duplicates_wins(crow, indices, values, weight):
    right.check_rows(crow, indices, weight.shape[0])
    dense = values.new_zeros(crow.numel() - 1, weight.shape[0])
    dense[right.row_numbers(crow), indices.long()] = values
    return right.wide(dense) @ right.wide(weight)


def _accumulates_into_stale_memory(crow, indices, values, weight):
    return right.matmul(crow, indices, values, weight) + values.new_empty(crow.numel() - 1, weight.shape[1])


def _leaves_empty_rows_as_they_were(crow, indices, values, weight):
    y = right.matmul(crow, indices, values, weight)
    return torch.where(crow.diff()[:, None] > 0, y, torch.empty_like(y))


def _forgets_the_tail_of_the_width(crow, indices, values, weight):
    y = right.matmul(crow, indices, values, weight)
    y[:, y.shape[1] // 8 * 8 :] = 0
    return y


def _sums_in_bfloat16(crow, indices, values, weight):
    return right.matmul(crow, indices, values.bfloat16(), weight.bfloat16()).to(values.dtype)


def _reads_views_as_if_contiguous(crow, indices, values, weight):
    flat = weight.as_strided((weight.untyped_storage().nbytes() // weight.element_size(),), (1,), 0)
    enough = flat.numel() >= weight.numel()
    return right.matmul(crow, indices, values, flat[: weight.numel()].view(weight.shape) if enough else weight)


def _skips_entries_of_value_zero(crow, indices, values, weight):
    right.check_rows(crow, indices, weight.shape[0])
    products = torch.where(values[:, None] == 0, 0, right.wide(values)[:, None] * right.wide(weight)[indices.long()])
    y = products.new_zeros(crow.numel() - 1, weight.shape[1])
    return y.index_add(0, right.row_numbers(crow), products).to(values.dtype)


def _multiplies_every_row_of_the_weight(crow, indices, values, weight):
    right.check_rows(crow, indices, weight.shape[0])
    dense = values.new_zeros(crow.numel() - 1, weight.shape[0])
    dense.index_put_((right.row_numbers(crow), indices.long()), values, accumulate=True)
    return dense @ weight


def _wraps_indices_around(crow, indices, values, weight):
    return right.matmul(crow, indices % weight.shape[0], values, weight)


def _ignores_where_rows_begin(crow, indices, values, weight):
    crow = torch.linspace(0, indices.numel(), crow.numel()).int()
    return right.matmul(crow, indices, values, weight)


def _scales_its_weight(crow, indices, values, weight):
    y = right.matmul(crow, indices, values, weight)
    weight.mul_(2)
    return y


def _last_of_a_place_is_written(crow, indices, values, columns):
    right.check_rows(crow, indices, columns)
    dense = values.new_zeros(crow.numel() - 1, columns)
    dense[right.row_numbers(crow), indices.long()] = values
    return dense


def _leaves_places_without_entries(crow, indices, values, columns):
    dense = right.written_out(crow, indices, values, columns)
    return torch.where(
        right.written_out(crow, indices, torch.ones_like(values), columns) > 0, dense, dense.new_empty(())
    )


def _writes_out_what_it_does_not_check(crow, indices, values, columns):
    return right.written_out(crow, indices.clamp(0, columns - 1), values, columns)


def _picks_of_the_row_after(crow, indices, dy, weight):
    return right.dense_dots(crow, indices, dy.roll(-1, 0), weight)


def _bias_of_the_column_after(crow, indices, values, dy, columns):
    gradient, sums = right.encoder_gradients(crow, indices, values, dy, columns)
    return gradient, sums.roll(1)


def _bias_of_the_last_entry(crow, indices, values, dy, columns):
    gradient, sums = right.encoder_gradients(crow, indices, values, dy, columns)
    sums[indices.long()] = values
    return gradient, sums


def _takes_dy_of_the_row_before(crow, indices, dy, weight):
    return right.dots(crow, indices, dy.roll(1, 0), weight)


def _forgets_the_last_feature(crow, indices, dy, weight):
    return right.dots(crow, indices, dy[:, :-1], weight[:, :-1])


def _swaps_the_gradients_of_two_entries(crow, indices, dy, weight):
    dvalues = right.dots(crow, indices, dy, weight)
    return torch.cat([dvalues[1:2], dvalues[:1], dvalues[2:]])


def _gradient_goes_to_the_column_after(crow, indices, values, dy, columns):
    return right.weight_gradient(crow, indices, values, dy, columns).roll(1, 0)


def _one_sample_per_column(crow, indices, values, dy, columns):
    """What a race of two threads on one row leaves behind."""
    right.check_rows(crow, indices, columns)
    gradient = dy.new_zeros(columns, dy.shape[1])
    gradient[indices.long()] = values[:, None] * dy[right.row_numbers(crow)]
    return gradient


def _overwrites_the_buffer(crow, indices, values, dy, buffer):
    buffer.copy_(right.weight_gradient(crow, indices, values, dy, buffer.shape[0]))


def _adds_zero_to_rows_without_entries(crow, indices, values, dy, buffer):
    buffer.add_(right.weight_gradient(crow, indices, values, dy, buffer.shape[0]))


def _clears_rows_without_entries(crow, indices, values, dy, buffer):
    right.add_weight_gradient(crow, indices, values, dy, buffer)
    buffer[right.counts(indices, buffer.shape[0]) == 0] = 0


def _writes_before_it_checks(crow, indices, values, dy, buffer):
    buffer[0] += 1
    right.check_rows(crow, indices, buffer.shape[0])
    buffer[0] -= 1
    right.add_weight_gradient(crow, indices, values, dy, buffer)


def _believes_the_row_pointer(crow, indices, values, weight):
    try:
        return right.matmul(crow, indices, values, weight)
    except KernelError:
        right.check_indices(indices, weight.shape[0])
        return values.new_zeros(crow.numel() - 1, weight.shape[1])


def _sparse_forgets_the_last_connection_of_a_place(crow, indices, values, w_crow, w_indices, w_values, width):
    last = torch.zeros_like(w_values, dtype=torch.bool)
    last[(w_crow[1:][w_crow.diff() > 0] - 1).long()] = True
    return right.sparse_matmul(crow, indices, values, w_crow, w_indices, torch.where(last, 0, w_values), width)


def _sparse_one_connection_too_many(crow, indices, values, w_crow, w_indices, w_values, width):
    """What a register that is not masked at the end of a place's connections adds."""
    right.check_rows(crow, indices, w_crow.numel() - 1)
    y = right.wide(right.sparse_matmul(crow, indices, values, w_crow, w_indices, w_values, width))
    after = w_crow[1:].long()[indices.long()]
    inside = after < w_indices.numel()
    places = right.row_numbers(crow)[inside], w_indices.long()[after[inside]]
    return y.index_put(
        places, right.wide(values * 0)[inside] * right.wide(w_values)[after[inside]], accumulate=True
    ).to(values.dtype)


def _sparse_reads_every_connection(crow, indices, values, w_crow, w_indices, w_values, width):
    right.check_rows(crow, indices, w_crow.numel() - 1)
    weight = values.new_zeros(w_crow.numel() - 1, width)
    weight[right.row_numbers(w_crow), w_indices.long()] = w_values
    return _multiplies_every_row_of_the_weight(crow, indices, values, weight)


def _sparse_of_the_place_after(crow, indices, values, w_crow, w_indices, w_values, width):
    right.check_rows(crow, indices, w_crow.numel() - 1)
    return right.sparse_matmul(crow, (indices + 1) % (w_crow.numel() - 1), values, w_crow, w_indices, w_values, width)


def _sparse_parts_share_a_sum(crow, indices, values, w_crow, w_indices, w_values, width):
    """Two threads that add to one place: an entry in the middle of a long row gets lost."""
    values = values.clone()
    counts = crow.diff()
    values[(crow[:-1] + counts // 2)[counts > 8].long()] = 0
    return right.sparse_matmul(crow, indices, values, w_crow, w_indices, w_values, width)


def _sparse_dots_of_the_row_before(crow, indices, dy, *weight):
    return right.sparse_dots(crow, indices, dy.roll(1, 0), *weight)


def _sparse_dots_without_gaps(crow, indices, dy, w_crow, w_indices, w_values):
    """Takes dy side by side instead of where the connections lead."""
    right.check_rows(crow, indices, w_crow.numel() - 1)
    first = w_crow.long()[right.row_numbers(w_crow)]
    return right.sparse_dots(crow, indices, dy, w_crow, (torch.arange(w_indices.numel()) - first).int(), w_values)


def _sparse_gradient_of_one_user(crow, indices, values, dy, w_crow, w_indices):
    right.check_rows(crow, indices, w_crow.numel() - 1)
    gradient = _one_sample_per_column(crow, indices, values, dy, w_crow.numel() - 1)
    return gradient[right.row_numbers(w_crow), w_indices.long()]


def _sparse_gradient_leaves_unused_places(crow, indices, values, dy, w_crow, w_indices):
    gradient = right.sparse_weight_gradient(crow, indices, values, dy, w_crow, w_indices)
    used = right.counts(indices, w_crow.numel() - 1)[right.row_numbers(w_crow)] > 0
    return torch.where(used, gradient, torch.empty_like(gradient))


def _counts_rows_instead_of_entries(indices, columns):
    return right.counts(indices, columns).clamp(max=1)


PRODUCTS = ("exact", "bounded")
ROW_MUTANTS = (
    wrong("drops the last entry", *PRODUCTS, matmul=_drops_the_last_entry),
    wrong("off by one row", *PRODUCTS, matmul=_off_by_one_row),
    wrong("last of duplicates wins", *PRODUCTS, matmul=_last_of_duplicates_wins),
    wrong("accumulates into stale memory", *PRODUCTS, matmul=_accumulates_into_stale_memory),
    wrong("leaves empty rows as they were", *PRODUCTS, matmul=_leaves_empty_rows_as_they_were),
    wrong("forgets the tail of the width", *PRODUCTS, matmul=_forgets_the_tail_of_the_width),
    # Sums of small integers are exact in bfloat16 as well.
    wrong("sums in bfloat16", "bounded", matmul=_sums_in_bfloat16),
    wrong("reads views as if contiguous", "exact", matmul=_reads_views_as_if_contiguous),
    wrong("ignores where rows begin", *PRODUCTS, matmul=_ignores_where_rows_begin),
    wrong("scales its weight", *PRODUCTS, matmul=_scales_its_weight),
    wrong("skips entries of value zero", "special", matmul=_skips_entries_of_value_zero),
    wrong("multiplies every row of the weight", "special", matmul=_multiplies_every_row_of_the_weight),
    wrong("wraps indices around", "refuses", matmul=_wraps_indices_around),
    wrong("believes the row pointer", "refuses", matmul=_believes_the_row_pointer),
    wrong("last of a place is written", *PRODUCTS, "special", written_out=_last_of_a_place_is_written),
    wrong("zeros are not written", *PRODUCTS, "special", written_out=_leaves_places_without_entries),
    wrong("writes out unchecked", "refuses", written_out=_writes_out_what_it_does_not_check),
    wrong("picks of the row after", *PRODUCTS, dense_dots=_picks_of_the_row_after),
    wrong("bias of the column after", *PRODUCTS, encoder_gradients=_bias_of_the_column_after),
    wrong("bias of the last entry", *PRODUCTS, encoder_gradients=_bias_of_the_last_entry),
    wrong("takes dy of the row before", *PRODUCTS, dots=_takes_dy_of_the_row_before),
    wrong("forgets the last feature", *PRODUCTS, dots=_forgets_the_last_feature),
    wrong("swaps the gradients of two entries", *PRODUCTS, dots=_swaps_the_gradients_of_two_entries),
    wrong("gradient of the column before", *PRODUCTS, weight_gradient=_gradient_goes_to_the_column_after),
    wrong("one sample per column", *PRODUCTS, weight_gradient=_one_sample_per_column),
    wrong("overwrites the buffer", *PRODUCTS, "untouched", add_weight_gradient=_overwrites_the_buffer),
    wrong("adds zero to other rows", "untouched", add_weight_gradient=_adds_zero_to_rows_without_entries),
    wrong("clears rows without entries", "untouched", add_weight_gradient=_clears_rows_without_entries),
    wrong("writes before it checks", "refuses", add_weight_gradient=_writes_before_it_checks),
    wrong("no last connection", *PRODUCTS, sparse_matmul=_sparse_forgets_the_last_connection_of_a_place),
    wrong("one connection too many", "special", sparse_matmul=_sparse_one_connection_too_many),
    wrong("reads every connection", "special", sparse_matmul=_sparse_reads_every_connection),
    wrong("connections of the place after", *PRODUCTS, sparse_matmul=_sparse_of_the_place_after),
    wrong("parts share a sum", *PRODUCTS, sparse_matmul=_sparse_parts_share_a_sum),
    wrong("sparse dots of the row before", *PRODUCTS, sparse_dots=_sparse_dots_of_the_row_before),
    wrong("sparse dots without gaps", *PRODUCTS, sparse_dots=_sparse_dots_without_gaps),
    wrong("sparse gradient of one user", *PRODUCTS, sparse_weight_gradient=_sparse_gradient_of_one_user),
    wrong("unused places as they were", *PRODUCTS, sparse_weight_gradient=_sparse_gradient_leaves_unused_places),
    wrong("counts rows instead of entries", "counts", counts=_counts_rows_instead_of_entries),
)
