"""The backend of CUDA tensors: Triton's kernels, and torch's dense products where the weight is written out.

Importing this imports Triton; `registry.py` does so when a tensor on a GPU first asks for a product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from offpath.kernels.backend import Backend
from offpath.kernels.errors import KernelError
from offpath.kernels.gpu import availability, bucketed, expand, sparse_weight
from offpath.kernels.gpu.costs import DeviceCosts
from offpath.kernels.gpu.rows import ROWS
from offpath.kernels.operands import DTYPES

# row-wise: gathers over activations that are stored by feature. dense: the weight written out, the rest is cuBLAS.
METHODS = frozenset(("row-wise", "dense"))
# Over activations in shared memory, by CUDA kernels, which Triton's interpreter does not run.
METHODS_OVER_PLANS = frozenset(("bucketed", "tiled"))
_INT8_INSTEAD = "move the layer with .cpu(), or turn it back with to_sparse()"
_METHODS_INSTEAD = "force 'row-wise', 'bucketed' or 'dense', or none"
# Odd constants of a mix of 64 bits (Steele, Lea & Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def make_backend() -> Backend:
    """The backend of the GPU; of tensors of the CPU where Triton's kernels are interpreted.

    Raises `KernelError`, which names what is missing, where no kernel can run.
    """
    availability.require()
    interpreted = availability.interpreted()
    device_type = "cpu" if interpreted else "cuda"

    def computes(of: str, dtype: torch.dtype) -> bool:
        return of == device_type and dtype in DTYPES

    return Backend(
        name="gpu:interpreted" if interpreted else "gpu",
        computes=computes,
        spmm=sparse_weight.spmm,
        sddmm=sparse_weight.sddmm,
        plan=bucketed.plan,
        planned_spmm=bucketed.planned_spmm,
        tiles=bucketed.tiles,
        tiled_sddmm=bucketed.tiled_sddmm,
        backward=bucketed.backward,
        bitmap=expand.bitmap,
        bitmap_spmm=_refusing("products over a bitmap", _METHODS_INSTEAD),
        bitmap_dx=_refusing("products over a bitmap", _METHODS_INSTEAD),
        bitmap_dvalues=_refusing("products over a bitmap", _METHODS_INSTEAD),
        bitmap_backward=_refusing("products over a bitmap", _METHODS_INSTEAD),
        filled_spmm=_refusing("products that fill in zeros", _METHODS_INSTEAD),
        filled_dx=_refusing("products that fill in zeros", _METHODS_INSTEAD),
        filled_dvalues=_refusing("products that fill in zeros", _METHODS_INSTEAD),
        bitmap_int8_spmm=_refusing("products of int8 values", _INT8_INSTEAD),
        planned_int8_spmm=_refusing("products of int8 values", _INT8_INSTEAD),
        filled_int8_spmm=_refusing("products of int8 values", _INT8_INSTEAD),
        int8_dots=_refusing("products of int8 values", _INT8_INSTEAD),
        expand=expand.expand,
        compress=expand.compress,
        rows=ROWS,
        convolutions=None,
        digest=digest,
        methods=METHODS if interpreted else METHODS | METHODS_OVER_PLANS,
        costs=None if interpreted else DeviceCosts(),
        lay_by_feature=sparse_weight.lay_by_feature,
    )


def digest(crow_indices: Tensor, col_indices: Tensor) -> int:
    """64 bits of the contents of both, summed over the mixed bits of every (place, index) in whole numbers."""
    total = torch.zeros((), dtype=torch.int64, device=col_indices.device)
    for seed, indices in ((0, crow_indices), (1, col_indices)):
        bits = torch.arange(indices.numel(), device=indices.device) * 2 + seed + 1
        bits = bits * _STEP + indices * _FIRST
        for shift, factor in ((30, _FIRST), (27, _SECOND)):
            bits = (bits ^ _shifted(bits, shift)) * factor
        total = total + (bits ^ _shifted(bits, 31)).sum()
    return int(total)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """To the right, zeros coming in from the left."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _refusing(what: str, instead: str) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise KernelError(f"expected a product that there are GPU kernels for, got {what}; {instead}")

    return refuse
