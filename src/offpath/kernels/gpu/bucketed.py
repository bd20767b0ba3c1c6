"""Products of a sparse weight with many tokens, whose activations wait in shared memory."""

from __future__ import annotations

import torch
from torch import Tensor

from offpath.kernels.errors import KernelError
from offpath.kernels.gpu.buckets import ROWS, TOKENS, WARPS, Buckets, expect_narrow, make_buckets
from offpath.kernels.gpu.driver import load, shared_bytes_limit
from offpath.kernels.gpu.launch import blocks_of, expect_operands, expect_shapes
from offpath.kernels.gpu.regions import TWOS, WARPS as DOT_WARPS, Regions, make_regions
from offpath.kernels.gpu.sparse_weight import features_of, tokens_of


def plan(
    crow_indices: Tensor, col_indices: Tensor, columns: int, dtype: torch.dtype, permutation: Tensor | None = None
) -> Buckets:
    """What `planned_spmm` wants to know of a pattern on a GPU: `MakePlan`."""
    most = shared_bytes_limit(col_indices.device)
    return make_buckets(crow_indices, col_indices, columns, dtype, permutation, most)


def tiles(crow_indices: Tensor, col_indices: Tensor, columns: int) -> Regions:
    """What `tiled_sddmm` wants to know of a pattern on a GPU: `MakePrepared`."""
    return make_regions(crow_indices, col_indices, columns, shared_bytes_limit(col_indices.device))


def planned_spmm(
    buckets: Buckets, values: Tensor, x: Tensor, bias: Tensor | None = None, /, feature_major: bool = False
) -> Tensor:
    """The product of `Spmm` over buckets, for float32 and bfloat16: `PlannedSpmm`."""
    optional = {} if bias is None else {"bias": bias}
    expect_operands(values=values, x=x, **optional)
    rows, columns = buckets.shape
    fits = values.shape == buckets.places.shape and x.dim() == 2 and x.shape[1] == columns
    expect_shapes(fits and (bias is None or bias.shape == (rows,)), values=values, x=x, **optional)
    if x.dtype is not buckets.dtype:
        raise KernelError(f"expected x of {buckets.dtype}, for which the plan was made, got {x.dtype}; make another")
    batch = x.shape[0]
    by_feature = _whole(features_of(x))
    width = by_feature.shape[1]
    y = values.new_empty(rows, width)
    if y.numel():
        # Both stay until the kernel is launched: what is freed before that may be taken, and written, by others.
        entries, bias = buckets.with_values(values), None if bias is None else bias.contiguous()
        kernel = load("bucketed_sum.cu", "bucketed_sum", y.device, **defines_of(buckets.dtype))
        kernel.launch(
            (buckets.row_order.numel() // ROWS, blocks_of(width, TOKENS)),
            WARPS * 32,
            buckets.shared_bytes,
            *(entries.data_ptr(), buckets.pair_offsets.data_ptr(), buckets.row_order.data_ptr()),
            *(by_feature.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr()),
            *(columns, buckets.chunk_columns, buckets.most_pairs, width),
        )
    return y[:, :batch].t() if feature_major else tokens_of(y, batch)


def tiled_sddmm(regions: Regions, dy: Tensor, x: Tensor, /) -> Tensor:
    """The product of `Sddmm` over regions, for float32 and bfloat16: `PreparedSddmm`."""
    expect_operands(dy=dy, x=x)
    rows, columns = regions.shape
    fits = dy.dim() == x.dim() == 2 and dy.shape == (x.shape[0], rows) and x.shape[1] == columns
    expect_shapes(fits, dy=dy, x=x)
    expect_narrow(dy.dtype)
    dy_by_feature, x_by_feature = _whole(features_of(dy)), _whole(features_of(x))
    dvalues = dy.new_empty(regions.nnz)
    if not dy.shape[0]:
        return dvalues.zero_()
    if dvalues.numel():
        kernel = load("bucketed_dots.cu", "bucketed_dots", dy.device, **dots_defines_of(dy.dtype))
        kernel.launch(
            (regions.corners.shape[0], 1),
            DOT_WARPS * 32,
            regions.shared_bytes,
            *(regions.twos.data_ptr(), regions.slots.data_ptr()),
            *(regions.corners.data_ptr(), regions.begins.data_ptr()),
            *(dy_by_feature.data_ptr(), x_by_feature.data_ptr(), dvalues.data_ptr()),
            *(rows, columns, regions.side, x_by_feature.shape[1]),
        )
    return dvalues


def backward(
    buckets: Buckets | None,
    regions: Regions | None,
    bitmap: object | None,
    values: Tensor,
    dy: Tensor,
    x: Tensor,
    /,
    feature_major: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dvalues, dbias) over the buckets of the transposed weight and its regions: `Backward`."""
    if buckets is None or regions is None:
        raise KernelError(
            "expected both gradients over plans, got one that fills in zeros; there is no kernel for that"
        )
    dx = planned_spmm(buckets, values, dy, feature_major=feature_major)
    return dx, tiled_sddmm(regions, dy, x), dy.sum(0)


def _whole(by_feature: Tensor) -> Tensor:
    """Where features lie behind one another, with nothing between them."""
    return by_feature if by_feature.is_contiguous() else by_feature.contiguous()


def dots_defines_of(dtype: torch.dtype) -> dict[str, int]:
    """The options that the source of the dot products is compiled with."""
    return {"BF16": int(dtype is torch.bfloat16), "WARPS": DOT_WARPS, "TWOS": TWOS}


def defines_of(dtype: torch.dtype) -> dict[str, int]:
    """The options that the source is compiled with."""
    return {"BF16": int(dtype is torch.bfloat16), "ROWS": ROWS, "WARPS": WARPS}
