"""The memory that native products write into."""

from __future__ import annotations

import math

import torch  # first: the native module joins the OpenMP pool that torch has loaded
from torch import Tensor

from offpath.kernels.plans import native_of_each_dtype

# Outputs of this size are taken from memory that earlier ones gave back: the system clears fresh pages at their
# first touch, which costs as much as a product at 90 %.
_KEPT_OUTPUT_BYTES = 1 << 18
_MOST_BYTES = 1 << 63  # of which torch says that there are none; their number would overflow
_TAKE_OUTPUT = native_of_each_dtype("take_output")


def output(like: Tensor, *shape: int) -> Tensor:
    kept = _KEPT_OUTPUT_BYTES <= math.prod(shape) * like.element_size() < _MOST_BYTES
    if not kept or like.dtype not in _TAKE_OUTPUT:
        return like.new_empty(*shape)  # half a microsecond less than with a tuple
    output = _TAKE_OUTPUT[like.dtype](shape)
    # torch.utils.deterministic is a module whose class is exchanged at import, which type checkers cannot see.
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if fills and torch.are_deterministic_algorithms_enabled():
        output.fill_(torch.nan)  # as torch does with the memory that it allocates
    return output
