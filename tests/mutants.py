"""Deliberately wrong backends. Each row says which checkers must reject it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from checkers import REFERENCE
from offpath.kernels import Backend


@dataclass(frozen=True)
class Mutant:
    backend: Backend
    rejected_by: tuple[str, ...] = ("exact", "bounded")


def _wrong(name: str, **products) -> Backend:
    return replace(REFERENCE, name=f"mutant: {name}", **products)


def _drops_last_connection(crow, col, values, x, bias=None):
    crow = crow.clone()
    crow[-1] = max(int(crow[-1]) - 1, int(crow[:-1].max()) if crow.numel() > 1 else 0)
    nnz = int(crow[-1])
    return REFERENCE.spmm(crow, col[:nnz], values[:nnz], x, bias)


def _off_by_one_row(crow, col, values, x, bias=None):
    return REFERENCE.spmm(crow, col, values, x, bias).roll(1, 1)


def _wrong_column(crow, col, values, x, bias=None):
    return REFERENCE.spmm(crow, (col + 1) % max(x.shape[1], 1), values, x, bias)


def _ignores_the_tail(crow, col, values, x, bias=None):
    y = x.new_empty(x.shape[0], crow.numel() - 1)
    whole = x.shape[0] // 16 * 16
    y[:whole] = REFERENCE.spmm(crow, col, values, x[:whole], bias)
    return y


def _accumulates_into_stale_output(crow, col, values, x, bias=None):
    return x.new_empty(x.shape[0], crow.numel() - 1) + REFERENCE.spmm(crow, col, values, x, bias)


def _skips_empty_rows(crow, col, values, x, bias=None):
    y = x.new_empty(x.shape[0], crow.numel() - 1)
    live = crow.diff() > 0
    y[:, live] = REFERENCE.spmm(crow, col, values, x, bias)[:, live]
    return y


def _forgets_the_bias(crow, col, values, x, bias=None):
    return REFERENCE.spmm(crow, col, values, x)


def _sums_in_bfloat16(crow, col, values, x, bias=None):
    low = [None if t is None else t.bfloat16() for t in (values, x, bias)]
    return REFERENCE.spmm(crow, col, low[0], low[1], low[2]).to(x.dtype)


def _scales_its_input(crow, col, values, x, bias=None):
    y = REFERENCE.spmm(crow, col, values, x, bias)
    x.mul_(2)
    return y


def _returns_minus_one(crow, col, values, x, bias=None):
    return torch.full_like(REFERENCE.spmm(crow, col, values, x, bias), -1)


def _reads_x_transposed(crow, col, values, x, bias=None):
    return REFERENCE.spmm(crow, col, values, x.t().contiguous().view(x.shape), bias)


def _shifts_the_gradient(crow, col, dy, x) -> Tensor:
    return REFERENCE.sddmm(crow, col, dy, x).roll(1)


def _swaps_the_gradients_operands(crow, col, dy, x) -> Tensor:
    return REFERENCE.sddmm(crow, col, dy, x.flip(0))


def _gradient_drops_the_last_sample(crow, col, dy, x) -> Tensor:
    return REFERENCE.sddmm(crow, col, dy[:-1], x[:-1])


def _gradient_accumulates_into_stale_memory(crow, col, dy, x) -> Tensor:
    return dy.new_empty(col.numel()) + REFERENCE.sddmm(crow, col, dy, x)


def _plan_ignores_the_permutation(plan, values, x, bias=None, feature_major=False):
    return REFERENCE.planned_spmm(replace(plan, permutation=None), values, x, bias)


def _plan_skips_the_last_group(plan, values, x, bias=None, feature_major=False):
    y = REFERENCE.planned_spmm(plan, values, x, bias)
    y[:, y.shape[1] // 6 * 6 :] = 0
    return y


def _plan_pads_the_batch_with_its_first_sample(plan, values, x, bias=None, feature_major=False):
    y = REFERENCE.planned_spmm(plan, values, x, bias)
    y[y.shape[0] // 16 * 16 :] = y[:1]
    return y


def _bitmap_reads_values_of_the_row_before(bitmap, values, x, bias=None):
    return REFERENCE.bitmap_spmm(bitmap, values.roll(1), x, bias)


def _bitmap_forgets_columns_after_a_word(bitmap, values, x, bias=None):
    x = x.clone()
    x[:, 64:] = 0
    return REFERENCE.bitmap_spmm(bitmap, values, x, bias)


def _expands_over_stale_memory(bitmap, values) -> Tensor:
    dense = REFERENCE.expand(bitmap, values)
    return torch.where(dense == 0, torch.empty_like(dense), dense)


def _compresses_by_column(bitmap, dense) -> Tensor:
    return REFERENCE.compress(bitmap, dense.flip(1))


def _tiles_keep_their_own_order(tiles, dy, x) -> Tensor:
    return REFERENCE.tiled_sddmm(tiles, dy, x)[torch.argsort(tiles.col_indices // 64, stable=True)]


def _tiles_forget_the_sums_of_the_tokens_before(tiles, dy, x) -> Tensor:
    last = max(dy.shape[0] - 1, 0) // 128 * 128
    return REFERENCE.tiled_sddmm(tiles, dy[last:], x[last:])


def _tiles_skip_the_rest_of_a_run(tiles, dy, x) -> Tensor:
    dvalues = REFERENCE.tiled_sddmm(tiles, dy, x)
    dvalues[dvalues.shape[0] // 4 * 4 :] = 0
    return dvalues


def _backward_sums_the_bias_over_half_the_batch(
    transpose, tiles, bitmap, values, dy, x, feature_major=False
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dvalues, _ = REFERENCE.backward(transpose, tiles, bitmap, values, dy, x)
    return dx, dvalues, dy[: dy.shape[0] // 2].sum(0)


def _backward_takes_the_values_of_the_original(
    transpose, tiles, bitmap, values, dy, x, feature_major=False
) -> tuple[Tensor, Tensor, Tensor]:
    transpose = None if transpose is None else replace(transpose, permutation=None)
    return REFERENCE.backward(transpose, tiles, bitmap, values, dy, x)


def _fills_with_the_value_before(bitmap, values, x, bias=None, feature_major=False) -> Tensor:
    weight = REFERENCE.expand(bitmap, values)
    rows = torch.arange(weight.shape[0]).repeat_interleave(bitmap.crow_indices.diff())
    absent = torch.ones(weight.shape, dtype=torch.bool)
    absent[rows, bitmap.col_indices.long()] = False
    y = x @ torch.where(absent, weight.roll(1, 1), weight).t()
    return y if bias is None else y + bias


def _filled_dx_forgets_the_row_without_a_partner(bitmap, values, dy) -> Tensor:
    rows = dy.shape[1] // 2 * 2
    dy = dy.clone()
    dy[:, rows:] = 0
    return REFERENCE.filled_dx(bitmap, values, dy)


def _filled_dvalues_forgets_the_token_without_a_partner(bitmap, dy, x) -> Tensor:
    tokens = dy.shape[0] // 2 * 2
    return REFERENCE.filled_dvalues(bitmap, dy[:tokens], x[:tokens])


def _bitmap_dx_forgets_the_last_part(bitmap, values, dy) -> Tensor:
    dy = dy.clone()
    dy[:, -1:] = 0
    return REFERENCE.bitmap_dx(bitmap, values, dy)


def _bitmap_dvalues_reads_the_columns_of_the_row_before(bitmap, dy, x) -> Tensor:
    return REFERENCE.bitmap_dvalues(bitmap, dy, x.roll(1, 1))


def _bitmap_backward_forgets_the_tokens_after_the_first_eight(
    bitmap, values, dy, x, fills_dx, fills_dvalues
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dvalues, dbias = REFERENCE.bitmap_backward(bitmap, values, dy, x, fills_dx, fills_dvalues)
    dx[8:] = 0
    return dx, dvalues, dbias


def _bitmap_backward_forgets_the_last_bias(
    bitmap, values, dy, x, fills_dx, fills_dvalues
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dvalues, dbias = REFERENCE.bitmap_backward(bitmap, values, dy, x, fills_dx, fills_dvalues)
    dbias[-1:] = 0
    return dx, dvalues, dbias


def _bitmap_backward_takes_x_of_the_token_before(
    bitmap, values, dy, x, fills_dx, fills_dvalues
) -> tuple[Tensor, Tensor, Tensor]:
    return REFERENCE.bitmap_backward(bitmap, values, dy, x.roll(1, 0), fills_dx, fills_dvalues)


def _int8_takes_the_scale_of_the_row_before(bitmap, values, scales, x, bias=None) -> Tensor:
    return REFERENCE.bitmap_int8_spmm(bitmap, values, scales.roll(1), x, bias)


def _int8_takes_the_scale_of_the_row_after(bitmap, values, scales, x, bias=None) -> Tensor:
    return REFERENCE.filled_int8_spmm(bitmap, values, scales.roll(-1), x, bias)


def _int8_scales_the_bias_too(bitmap, values, scales, x, bias=None) -> Tensor:
    return REFERENCE.bitmap_int8_spmm(bitmap, values, scales, x, None if bias is None else bias * scales)


def _int8_takes_bytes_without_their_sign(plan, values, scales, x, bias=None) -> Tensor:
    unsigned = values.double() if values.is_floating_point() else values.double() % 256
    return REFERENCE.planned_int8_spmm(plan, unsigned, scales, x, bias)


MUTANTS = (
    Mutant(_wrong("int8 scale of the row before", bitmap_int8_spmm=_int8_takes_the_scale_of_the_row_before)),
    Mutant(_wrong("int8 scale of the row after", filled_int8_spmm=_int8_takes_the_scale_of_the_row_after)),
    Mutant(_wrong("int8 scales the bias", bitmap_int8_spmm=_int8_scales_the_bias_too)),
    Mutant(_wrong("int8 without signs", planned_int8_spmm=_int8_takes_bytes_without_their_sign)),
    Mutant(_wrong("bitmap reads other values", bitmap_spmm=_bitmap_reads_values_of_the_row_before)),
    Mutant(_wrong("bitmap forgets columns", bitmap_spmm=_bitmap_forgets_columns_after_a_word)),
    Mutant(_wrong("bitmap forgets a part", bitmap_dx=_bitmap_dx_forgets_the_last_part)),
    Mutant(_wrong("bitmap reads other columns", bitmap_dvalues=_bitmap_dvalues_reads_the_columns_of_the_row_before)),
    Mutant(_wrong("few tokens are eight", bitmap_backward=_bitmap_backward_forgets_the_tokens_after_the_first_eight)),
    Mutant(_wrong("forgets the last bias", bitmap_backward=_bitmap_backward_forgets_the_last_bias)),
    Mutant(_wrong("x of the token before", bitmap_backward=_bitmap_backward_takes_x_of_the_token_before)),
    Mutant(_wrong("expands over stale memory", expand=_expands_over_stale_memory)),
    Mutant(_wrong("compresses the wrong entries", compress=_compresses_by_column)),
    Mutant(_wrong("tiles keep their own order", tiled_sddmm=_tiles_keep_their_own_order)),
    Mutant(_wrong("tiles forget earlier tokens", tiled_sddmm=_tiles_forget_the_sums_of_the_tokens_before)),
    Mutant(_wrong("tiles skip the rest of a run", tiled_sddmm=_tiles_skip_the_rest_of_a_run)),
    Mutant(_wrong("bias over half the batch", backward=_backward_sums_the_bias_over_half_the_batch)),
    Mutant(_wrong("values of the original", backward=_backward_takes_the_values_of_the_original)),
    Mutant(_wrong("fills with the value before", filled_spmm=_fills_with_the_value_before)),
    Mutant(_wrong("forgets the last row", filled_dx=_filled_dx_forgets_the_row_without_a_partner)),
    Mutant(_wrong("forgets the last token", filled_dvalues=_filled_dvalues_forgets_the_token_without_a_partner)),
    Mutant(_wrong("plan ignores the permutation", planned_spmm=_plan_ignores_the_permutation)),
    Mutant(_wrong("plan skips the last group", planned_spmm=_plan_skips_the_last_group)),
    Mutant(_wrong("plan pads with the first sample", planned_spmm=_plan_pads_the_batch_with_its_first_sample)),
    Mutant(_wrong("drops the last connection", spmm=_drops_last_connection)),
    Mutant(_wrong("off by one row", spmm=_off_by_one_row)),
    Mutant(_wrong("wrong column", spmm=_wrong_column)),
    Mutant(_wrong("ignores the tail", spmm=_ignores_the_tail)),
    Mutant(_wrong("accumulates into stale output", spmm=_accumulates_into_stale_output)),
    Mutant(_wrong("skips empty rows", spmm=_skips_empty_rows)),
    Mutant(_wrong("forgets the bias", spmm=_forgets_the_bias)),
    # Sums of small integers are exact in bfloat16 as well.
    Mutant(_wrong("sums in bfloat16", spmm=_sums_in_bfloat16), rejected_by=("bounded",)),
    Mutant(_wrong("scales its input", spmm=_scales_its_input)),
    Mutant(_wrong("returns minus one", spmm=_returns_minus_one)),
    Mutant(_wrong("reads x transposed", spmm=_reads_x_transposed)),
    Mutant(_wrong("shifts the gradient", sddmm=_shifts_the_gradient)),
    Mutant(_wrong("swaps the gradient's operands", sddmm=_swaps_the_gradients_operands)),
    Mutant(_wrong("gradient drops the last sample", sddmm=_gradient_drops_the_last_sample)),
    Mutant(_wrong("gradient accumulates into stale memory", sddmm=_gradient_accumulates_into_stale_memory)),
)
