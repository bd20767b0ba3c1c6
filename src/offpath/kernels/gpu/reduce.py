"""The last step of products whose sums are computed in parts."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from offpath.kernels.gpu.driver import Kernel, load

_WARPS = 8


def sum_parts(partial: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y [tokens, n_outputs] = bias + the sum of `partial` float32 [parts, tokens, n_outputs], in their order.

    `y` and `bias` are float32 or bfloat16; everything contiguous, on one device, which the caller has checked.
    """
    kernel = _kernel(y.dtype, y.device)
    parts, tokens, n_outputs = partial.shape
    kernel.launch(
        (-(-tokens * n_outputs // (_WARPS * 32)), 1),
        _WARPS * 32,
        0,
        *(partial.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr()),
        *(n_outputs, tokens, parts),
    )


@lru_cache(maxsize=64)
def _kernel(dtype: torch.dtype, device: torch.device) -> Kernel:
    return load("reduce.cu", "reduce", device, BF16=int(dtype is torch.bfloat16), WARPS=_WARPS)
