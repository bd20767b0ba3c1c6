"""The native CPU kernels: float32, float64 and bfloat16, one variant per instruction set, on torch's own threads.

The native module is handed tensors and looks itself whether they fit: device, dtype, shape, strides. What does not fit
it refuses, and `operands.py` says why. The contents of a weight's index tensors are the caller's to check (`Pattern`
does, once per pattern; the ops see to it).
"""

from __future__ import annotations

from functools import partial

import torch  # first: the native module joins the OpenMP pool that torch has loaded
from torch import Tensor

from offpath.kernels import _native
from offpath.kernels.backend import Backend, KernelError
from offpath.kernels.operands import DTYPES, refuse
from offpath.kernels.plans import columns_of_bitmap, make_bitmap, make_plan, make_tiles
from offpath.kernels.variant import Variant
from offpath.kernels.variant_convolution import ConvolutionVariant
from offpath.kernels.variant_gradients import GradientVariant
from offpath.kernels.variant_int8 import Int8Variant
from offpath.kernels.variant_rows import RowVariant


def isas() -> dict[str, bool]:
    """The instruction sets built into the module, slowest first, and whether this machine runs them."""
    return dict(_native.isas())


def best_isa() -> str:
    """The fastest instruction set that this machine runs."""
    return [name for name, runs_here in _native.isas() if runs_here][-1]


def calls(isa: str) -> int:
    """How many products the variant `isa` has computed in this process."""
    return _native.calls(list(isas()).index(isa))


def native_file() -> str:
    """The file of the native module."""
    return str(_native.__file__)


def pool_library() -> str:
    """The file of the OpenMP runtime whose threads the kernels run on."""
    return _native.pool_library()


def make_backend(isa: str) -> Backend:
    """The backend that runs the variant compiled for `isa`.

    Raises `KernelError` when that variant was not built or this machine cannot run it.
    """
    built = isas()
    if not built.get(isa):
        reason = "this machine cannot run it" if isa in built else "it was not built"
        available = ", ".join(name for name, runs_here in built.items() if runs_here)
        raise KernelError(f"expected an ISA that runs here ({available}), got {isa!r}: {reason}")
    index = list(built).index(isa)
    variant, gradients, int8 = Variant(index), GradientVariant(index), Int8Variant(index)
    return Backend(
        name=f"cpu:{isa}",
        computes=_computes,
        spmm=variant.spmm,
        sddmm=gradients.sddmm,
        plan=partial(make_plan, index),
        planned_spmm=variant.planned_spmm,
        tiles=make_tiles,
        tiled_sddmm=gradients.tiled_sddmm,
        backward=gradients.backward,
        bitmap=make_bitmap,
        columns_of_bitmap=columns_of_bitmap,
        bitmap_spmm=variant.bitmap_spmm,
        bitmap_dx=gradients.bitmap_dx,
        bitmap_dvalues=gradients.bitmap_dvalues,
        bitmap_backward=gradients.bitmap_backward,
        filled_spmm=variant.filled_spmm,
        filled_dx=gradients.filled_dx,
        filled_dvalues=gradients.filled_dvalues,
        bitmap_int8_spmm=int8.bitmap_spmm,
        planned_int8_spmm=int8.planned_spmm,
        filled_int8_spmm=int8.filled_spmm,
        int8_dots=int8.dots,
        expand=variant.expand,
        compress=variant.compress,
        rows=RowVariant(index).products(),
        convolutions=ConvolutionVariant(index).products(),
        digest=_digest,
        native=True,
    )


def _computes(device_type: str, dtype: torch.dtype) -> bool:
    return device_type == "cpu" and dtype in DTYPES


def _digest(crow_indices: Tensor, col_indices: Tensor) -> int:
    found = _native.digest(crow_indices, col_indices)
    if found is None:
        refuse(crow_indices=crow_indices, col_indices=col_indices)
    return found
