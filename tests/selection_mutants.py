"""Deliberately wrong selections and encoders of sparse rows. Each row says which checkers must reject it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from offpath.kernels import reference_rows as right
from row_mutants import wrong


def _by(key: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """The k largest by another order than that of the scores."""

    def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        _, indices = right.topk(key(x), k)
        return x.gather(1, indices.long()), indices

    return topk


def _ties_to_the_highest_index(x, k):
    indices = (x.shape[1] - 1 - right.topk(x.flip(1), k)[1]).flip(1)
    return x.gather(1, indices.long()), indices


def _one_too_few(x, k):
    values, indices = right.topk(x, k)
    return torch.cat([values[:, : max(k - 1, 0)], values[:, :1]], 1)[:, :k], indices


def _descending_like_torch(x, k):
    values, indices = x.sort(dim=1, descending=True, stable=True)
    return values[:, :k].contiguous(), indices[:, :k].int()


def _forgets_candidates_that_overflow(x, k):
    """Keeps what is at least the k-th largest of the first 2 k scores, in a buffer that has an end."""
    right.check_k(k, x.shape[1])
    if k == 0:
        return right.topk(x, k)
    threshold = x[:, : 2 * k].topk(k).values[:, -1:]
    candidate = ~(x < threshold)
    kept = candidate & (candidate.cumsum(1) <= 4 * k)
    _, indices = right.topk(torch.where(kept, x, -float("inf")), k)
    return x.gather(1, indices.long()), indices


def _row_of_the_first_sample(x, k):
    values, indices = right.topk(x, k)
    return values, indices[:1].expand_as(indices)


def _cuts_each_row_to_its_share(x, k):
    right.check_k(k, x.numel())
    per_row = k // max(x.shape[0], 1)
    values, indices = right.topk(x, per_row)
    crow = torch.arange(x.shape[0] + 1, dtype=torch.int32) * per_row
    return crow, indices.flatten(), values.flatten()


def _batch_ties_in_column_order(x, k):
    right.check_k(k, x.numel())
    order = x.t().flatten().sort(descending=True, stable=True).indices[:k]
    flat = (order % max(x.shape[0], 1) * x.shape[1] + order // max(x.shape[0], 1)).sort().values
    crow = torch.zeros(x.shape[0] + 1, dtype=torch.int32)
    crow[1:] = torch.bincount(flat // max(x.shape[1], 1), minlength=x.shape[0]).cumsum(0)
    return crow, (flat % max(x.shape[1], 1)).int(), x.flatten()[flat]


def _nonzeros_that_are_positive(x, threshold):
    return right.above(x, x.new_zeros(x.shape[1]) if threshold is None else threshold)


def _nonzeros_without_nan(x, threshold):
    return right.above(x.nan_to_num(0.0, float("inf"), -float("inf")) if threshold is None else x, threshold)


def _at_least_the_threshold(x, threshold):
    if threshold is None:
        return right.above(x, None)
    crow, indices, _ = right.above(torch.where(x == threshold, float("inf"), x), threshold)
    return crow, indices, x[~(x < threshold)]


def _drops_nan(x, threshold):
    crow, indices, values = right.above(x.nan_to_num(-float("inf"), float("inf"), -float("inf")), threshold)
    return crow, indices, values


def _one_threshold_for_all_columns(x, threshold):
    return right.above(x, None if threshold is None else threshold[:1].expand_as(threshold))


def _encoder_forgets_the_bias(x, weight, bias, k):
    return right.encode_topk(x, weight, None, k)


def _encoder_adds_the_bias_to_the_chosen_only(x, weight, bias, k):
    values, indices = right.encode_topk(x, weight, None, k)
    return values if bias is None else values + bias[indices.long()], indices


def _encoder_in_bfloat16(x, weight, bias, k):
    operands = [None if t is None else t.bfloat16() for t in (x, weight, bias)]
    _, indices = right.encode_topk(operands[0], operands[1], operands[2], k)
    return torch.nn.functional.linear(x, weight, bias).gather(1, indices.long()), indices


def _encoder_forgets_tokens_after_a_block(x, weight, bias, k):
    values, indices = right.encode_topk(x, weight, bias, k)
    values[64:] = 0
    return values, indices


def _encoder_forgets_latents_after_a_block(x, weight, bias, k):
    right.check_k(k, weight.shape[0])
    block = max(k, 512)
    return right.encode_topk(x, weight[:block], None if bias is None else bias[:block], k)


SELECTION_MUTANTS = (
    wrong("ties to the highest index", "topk", topk=_ties_to_the_highest_index),
    wrong("largest absolute values", "topk", topk=_by(Tensor.abs)),
    wrong("NaN as the smallest", "topk", topk=_by(lambda x: x.nan_to_num(-float("inf"), float("inf"), -float("inf")))),
    wrong("NaN as zero", "topk", topk=_by(lambda x: x.nan_to_num(0.0, float("inf"), -float("inf")))),
    wrong("+inf as large as NaN", "topk", topk=_by(lambda x: x.nan_to_num(float("inf"), float("inf"), -float("inf")))),
    wrong("0.0 over -0.0", "topk", topk=_by(lambda x: torch.where((x == 0) & ~x.signbit(), 1e-30, x))),
    wrong("subnormals are zero", "topk", topk=_by(lambda x: torch.where(x.abs() < 1e-37, 0, x))),
    wrong("one too few", "topk", topk=_one_too_few),
    wrong("in descending order", "topk", topk=_descending_like_torch),
    wrong("forgets candidates that overflow", "topk", topk=_forgets_candidates_that_overflow),
    wrong("the first row's entries for all", "topk", topk=_row_of_the_first_sample),
    wrong("each row its share", "batch_topk", batch_topk=_cuts_each_row_to_its_share),
    wrong("ties in column order", "batch_topk", batch_topk=_batch_ties_in_column_order),
    wrong("at least the threshold", "above", above=_at_least_the_threshold),
    wrong("drops NaN", "above", above=_drops_nan),
    wrong("nonzeros that are positive", "above", above=_nonzeros_that_are_positive),
    wrong("nonzeros without NaN", "above", above=_nonzeros_without_nan),
    wrong("one threshold for all columns", "above", above=_one_threshold_for_all_columns),
    wrong("forgets the bias", "encode exact", "encode bounded", encode_topk=_encoder_forgets_the_bias),
    wrong(
        "bias of the chosen only",
        "encode exact",
        "encode bounded",
        encode_topk=_encoder_adds_the_bias_to_the_chosen_only,
    ),
    wrong("chooses in bfloat16", "encode bounded", encode_topk=_encoder_in_bfloat16),
    wrong("tokens after a block", "encode exact", "encode bounded", encode_topk=_encoder_forgets_tokens_after_a_block),
    wrong(
        "latents after a block",
        "encode exact",
        "encode bounded",
        "encode scores",
        encode_topk=_encoder_forgets_latents_after_a_block,
    ),
)
