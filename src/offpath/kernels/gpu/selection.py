"""Which entries live, by torch's selections: with the ties and the NaN that `RowProducts` promises.

torch finds the k largest, but says nothing of which among equal ones: so it is asked for the least of them, and where
more entries equal that than can be chosen, the first ones are taken. Nothing here waits for the device but `above`,
which has to know how many entries there are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from offpath.kernels.errors import KernelError
from offpath.kernels.gpu.ties import take_first_of_equals
from offpath.kernels.operands import in_own_dtype, wide
from offpath.kernels.reference_rows import check_k

# Scores of one block of rows: few enough to be forgotten soon, enough to keep the device busy.
BLOCK_ENTRIES = 2**26
INT32_MAX = 2**31 - 1
# From here on, torch multiplies 16-bit matrices into float32.
_HAS_OUT_DTYPE = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) >= (2, 8)


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, indices) of the k largest entries of each row, ascending in the index; ties go to the lowest index."""
    _check_scores(x)
    check_k(k, x.shape[1])
    indices = _places_of_largest(x, k)
    return x.gather(1, indices), indices.int()


def batch_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(crow_indices, indices, values) of the k largest entries of all of x; ties go to the first in row-major order."""
    _check_scores(x)
    check_k(k, min(x.numel(), INT32_MAX))
    flat, columns = x.reshape(1, -1), max(x.shape[1], 1)
    places = _places_of_largest(flat, k)[0]
    starts = torch.arange(x.shape[0] + 1, device=x.device) * columns
    crow_indices = torch.searchsorted(places, starts, out_int32=True)
    return crow_indices, (places % columns).int(), flat[0, places]


def above(x: Tensor, threshold: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(crow_indices, indices, values) of the entries above their column's threshold, or NaN; without one, not zero."""
    _check_scores(x)
    live = x != 0 if threshold is None else ~(x <= threshold)
    places = live.reshape(-1).nonzero().squeeze(1)
    if places.numel() > INT32_MAX:
        raise KernelError(f"expected at most 2^31 - 1 entries, got {places.numel()}; split the batch")
    crow_indices = torch.zeros(x.shape[0] + 1, dtype=torch.int32, device=x.device)
    crow_indices[1:] = live.sum(1).cumsum(0)
    return crow_indices, (places % max(x.shape[1], 1)).int(), x.reshape(-1)[places]


def encode_topk(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """`topk(x @ weight.T + bias, k)` of scores in the type of their sums, a block of rows at a time."""
    _check_scores(x)
    check_k(k, weight.shape[0])
    block = max(1, BLOCK_ENTRIES // max(1, weight.shape[0]))
    if x.shape[0] <= block:
        found, indices = topk(_scores(x, weight, bias), k)
        return found.to(x.dtype), indices
    values = x.new_empty(x.shape[0], k)
    indices = x.new_empty(x.shape[0], k, dtype=torch.int32)
    for first in range(0, x.shape[0], block):
        some = slice(first, first + block)
        found, indices[some] = topk(_scores(x[some], weight, bias), k)
        values[some] = found.to(x.dtype)
    return values, indices


def _places_of_largest(x: Tensor, k: int) -> Tensor:
    """The places [rows, k] of the k largest entries of each row, ascending."""
    if k == 0 or x.shape[0] == 0:
        return x.new_empty(x.shape[0], k, dtype=torch.int64)
    # One more than is wanted says where equal ones were left out, without another pass over the scores.
    best, places = x.topk(min(k + 1, x.shape[1]), dim=1)
    places = places[:, :k].sort(dim=1).values
    if k < x.shape[1]:
        take_first_of_equals(x, best, places)
    return places


def _scores(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with in_own_dtype(x):  # an autocast would round what is to be compared
        if x.is_cuda and x.element_size() == 2 and _HAS_OUT_DTYPE:
            scores = torch.mm(x, weight.t(), out_dtype=torch.float32)
            return scores if bias is None else scores.add_(bias)
        return linear(wide(x), wide(weight), None if bias is None else wide(bias))


def _check_scores(x: Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise KernelError(f"expected floating scores [rows, columns], got {x.dtype} {tuple(x.shape)}")
