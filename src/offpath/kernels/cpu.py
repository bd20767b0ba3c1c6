"""The native CPU kernels: float32 and float64, one variant per instruction set, on torch's own threads.

The native module is handed raw addresses, so this file checks everything that could make it read or write outside
a tensor: device, dtype, shape, strides. The contents of the index tensors are the caller's to check (`Pattern`
does, once per pattern; the ops see to it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch  # first: the native module joins the OpenMP pool that torch has loaded
from torch import Tensor

from offpath.kernels import _native
from offpath.kernels.backend import Backend, KernelError

_SPMM = {torch.float32: _native.spmm_f32, torch.float64: _native.spmm_f64}
# Below this batch, gathering the values and packing the panels cost more than the plan saves
# (benchmarks/planned_from_batch.py).
PLANNED_FROM_BATCH = 64
_PLANNED_SPMM = {torch.float32: _native.planned_spmm_f32, torch.float64: _native.planned_spmm_f64}
_SDDMM = {torch.float32: _native.sddmm_f32, torch.float64: _native.sddmm_f64}


def isas() -> dict[str, bool]:
    """The instruction sets built into the module, slowest first, and whether this machine runs them."""
    return dict(_native.isas())


def best_isa() -> str:
    """The fastest instruction set that this machine runs."""
    return [name for name, runs_here in _native.isas() if runs_here][-1]


def calls(isa: str) -> int:
    """How many products the variant `isa` has computed in this process."""
    return _native.calls(list(isas()).index(isa))


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

    def spmm(
        crow_indices: Tensor, col_indices: Tensor, values: Tensor, x: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        rows = crow_indices.shape[0] - 1
        dtype = values.dtype
        if not (
            _are_indices(crow_indices, col_indices)
            and dtype in _SPMM
            and dtype is x.dtype
            and values.is_cpu
            and x.is_cpu
            and x.layout is torch.strided
            and x.dim() == 2
            and values.shape == col_indices.shape
            and values.is_contiguous()
            and _is_bias(bias, dtype, rows)
        ):
            _refuse(_SPMM, crow_indices=crow_indices, col_indices=col_indices, values=values, x=x, bias=bias)
        x, x_strides = _one_unit_stride(x)
        batch, columns = x.shape
        y = values.new_empty((batch, rows))
        _SPMM[dtype](
            index,
            rows,
            columns,
            batch,
            _address(crow_indices),
            _address(col_indices),
            _address(values),
            0 if bias is None else _address(bias),
            _address(x),
            *x_strides,
            _address(y),
            torch.get_num_threads(),
        )
        return y

    def sddmm(crow_indices: Tensor, col_indices: Tensor, dy: Tensor, x: Tensor) -> Tensor:
        rows = crow_indices.shape[0] - 1
        dtype = dy.dtype
        if not (
            _are_indices(crow_indices, col_indices)
            and dtype in _SDDMM
            and dtype is x.dtype
            and dy.is_cpu
            and x.is_cpu
            and dy.layout is x.layout is torch.strided
            and x.dim() == 2
            and dy.shape == (x.shape[0], rows)
        ):
            _refuse(_SDDMM, crow_indices=crow_indices, col_indices=col_indices, dy=dy, x=x)
        dy, dy_strides = _one_unit_stride(dy)
        x, x_strides = _one_unit_stride(x)
        batch, columns = x.shape
        dvalues = dy.new_empty(col_indices.shape)
        _SDDMM[dtype](
            index,
            rows,
            columns,
            batch,
            _address(crow_indices),
            _address(col_indices),
            _address(dy),
            *dy_strides,
            _address(x),
            *x_strides,
            _address(dvalues),
            torch.get_num_threads(),
        )
        return dvalues

    def planned_spmm(plan: Plan, values: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        dtype = values.dtype
        if not (
            dtype in _PLANNED_SPMM
            and dtype is x.dtype
            and values.is_cpu
            and x.is_cpu
            and x.layout is torch.strided
            and x.dim() == 2
            and x.shape[1] == plan.columns
            and values.shape == (plan.nnz,)
            and values.is_contiguous()
            and _is_bias(bias, dtype, plan.rows)
        ):
            _refuse(_PLANNED_SPMM, values=values, x=x, bias=bias)
        x, x_strides = _one_unit_stride(x)
        batch = x.shape[0]
        y = values.new_empty((batch, plan.rows))
        _PLANNED_SPMM[dtype](
            index,
            plan.native,
            batch,
            _address(values),
            0 if bias is None else _address(bias),
            _address(x),
            *x_strides,
            _address(y),
            torch.get_num_threads(),
        )
        return y

    return Backend(f"cpu:{isa}", _computes, spmm, sddmm, make_plan, planned_spmm, _digest, PLANNED_FROM_BATCH)


@dataclass(frozen=True)
class Plan:
    """A pattern in the order in which the bucketed product goes through it; holds its own copy of the columns."""

    native: _native.Plan
    rows: int
    columns: int
    nnz: int

    @property
    def bytes(self) -> int:
        """Bytes that the plan takes."""
        return self.native.bytes


def make_plan(crow_indices: Tensor, col_indices: Tensor, columns: int, permutation: Tensor | None = None) -> Plan:
    """Plan a canonical pattern, natively and on all threads; O(nnz + rows + columns)."""
    rows, nnz = crow_indices.shape[0] - 1, col_indices.shape[0]
    if not (
        _are_indices(crow_indices, col_indices)
        and (permutation is None or (_are_indices(crow_indices, permutation) and permutation.shape[0] == nnz))
    ):
        _refuse({}, crow_indices=crow_indices, col_indices=col_indices, permutation=permutation)
    native = _native.make_plan(
        rows,
        columns,
        _address(crow_indices),
        _address(col_indices),
        0 if permutation is None else _address(permutation),
        torch.get_num_threads(),
    )
    return Plan(native, rows, columns, nnz)


def _computes(device_type: str, dtype: torch.dtype) -> bool:
    return device_type == "cpu" and dtype in _SPMM


def _is_bias(bias: Tensor | None, dtype: torch.dtype, rows: int) -> bool:
    return bias is None or (bias.dtype is dtype and bias.is_cpu and bias.shape == (rows,) and bias.is_contiguous())


def _digest(crow_indices: Tensor, col_indices: Tensor) -> int:
    if not _are_indices(crow_indices, col_indices):
        _refuse({}, crow_indices=crow_indices, col_indices=col_indices)
    rows, nnz = crow_indices.shape[0] - 1, col_indices.shape[0]
    return _native.digest(rows, nnz, _address(crow_indices), _address(col_indices))


def _address(tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if address == 0 and tensor.numel():
        raise KernelError(f"expected a tensor with memory behind it, got {tuple(tensor.shape)} whose storage was freed")
    return address


def _are_indices(crow_indices: Tensor, col_indices: Tensor) -> bool:
    return (
        crow_indices.dtype is torch.int32
        and col_indices.dtype is torch.int32
        and crow_indices.is_cpu
        and col_indices.is_cpu
        and crow_indices.dim() == 1
        and col_indices.dim() == 1
        and crow_indices.shape[0] > 0
        and crow_indices.is_contiguous()
        and col_indices.is_contiguous()
    )


def _refuse(kernels: dict, **given: Tensor | None) -> NoReturn:
    got = ", ".join(
        f"{name} {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        + ("" if tensor.dim() != 1 or tensor.is_contiguous() else " (not contiguous)")
        for name, tensor in given.items()
        if tensor is not None
    )
    dtypes = ", ".join(map(str, kernels)) or "any dtype"
    raise KernelError(
        f"expected dense CPU tensors: contiguous int32 indices, and operands of one dtype among {dtypes} whose shapes "
        f"fit, vectors contiguous; got {got}. Cast or move the module or its input so that all agree"
    )


def _one_unit_stride(matrix: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """`matrix` with its (feature, batch) strides, one of them 1; a copy only when the tensor has no such stride."""
    if 1 not in matrix.stride():
        matrix = matrix.contiguous()
    batch_stride, feature_stride = matrix.stride()
    return matrix, (feature_stride, batch_stride)
