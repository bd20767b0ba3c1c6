from collections.abc import Sequence

from torch import Tensor

def isas() -> list[tuple[str, bool]]: ...
def calls(isa: int) -> int: ...
def pool_library() -> str: ...
def kept_scratch_bytes() -> int: ...
def digest(rows: int, nnz: int, crow_indices: int, col_indices: int, /) -> int: ...

class Plan:
    @property
    def bytes(self) -> int: ...

class Tiles:
    @property
    def bytes(self) -> int: ...

class Bitmap:
    @property
    def bytes(self) -> int: ...

class ConvolutionPlan:
    @property
    def bytes(self) -> int: ...

class ConvolutionTiles:
    @property
    def bytes(self) -> int: ...

def make_plan_f32(
    isa: int,
    rows: int,
    columns: int,
    crow_indices: int,
    col_indices: int,
    permutation: int,
    threads: int,
    /,
) -> Plan: ...
def make_tiles(rows: int, columns: int, crow_indices: int, col_indices: int, threads: int, /) -> Tiles: ...
def make_bitmap(rows: int, columns: int, crow_indices: int, col_indices: int, threads: int, /) -> Bitmap: ...
def planned_spmm_f32(
    isa: int,
    plan: Plan,
    batch: int,
    values: int,
    bias: int,
    x: int,
    x_feature_stride: int,
    x_batch_stride: int,
    y: int,
    feature_major: bool,
    threads: int,
    /,
) -> None: ...
def bitmap_spmm_f32(
    isa: int,
    bitmap: Bitmap,
    batch: int,
    values: int,
    bias: int,
    x: int,
    x_feature_stride: int,
    x_batch_stride: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def tiled_sddmm_f32(
    isa: int,
    tiles: Tiles,
    batch: int,
    dy: int,
    dy_feature_stride: int,
    dy_batch_stride: int,
    x: int,
    x_feature_stride: int,
    x_batch_stride: int,
    dvalues: int,
    threads: int,
    /,
) -> None: ...
def backward_f32(
    isa: int,
    made: tuple[Plan | None, Tiles | None, Bitmap | None],
    rows: int,
    columns: int,
    nnz: int,
    batch: int,
    values: int,
    dy: int,
    dy_feature_stride: int,
    dy_batch_stride: int,
    x: int,
    x_feature_stride: int,
    x_batch_stride: int,
    dx: int,
    feature_major: bool,
    dvalues: int,
    dbias: int,
    threads: int,
    /,
) -> None: ...
def bitmap_backward_f32(
    isa: int,
    bitmap: Bitmap,
    batch: int,
    values: int,
    dy: int,
    dy_feature_stride: int,
    dy_batch_stride: int,
    x: int,
    x_feature_stride: int,
    x_batch_stride: int,
    fills_dx: bool,
    fills_dvalues: bool,
    dx: int,
    dvalues: int,
    dbias: int,
    threads: int,
    /,
) -> None: ...
def filled_spmm_f32(
    isa: int,
    bitmap: Bitmap,
    batch: int,
    values: int,
    bias: int,
    x: int,
    x_feature_stride: int,
    x_batch_stride: int,
    y: int,
    feature_major: bool,
    threads: int,
    /,
) -> None: ...
def bitmap_dx_f32(
    isa: int,
    bitmap: Bitmap,
    batch: int,
    values: int,
    dy: int,
    dy_feature_stride: int,
    dy_batch_stride: int,
    dx: int,
    threads: int,
    /,
) -> None: ...
def bitmap_dvalues_f32(
    isa: int,
    bitmap: Bitmap,
    batch: int,
    dy: int,
    dy_feature_stride: int,
    dy_batch_stride: int,
    x: int,
    x_feature_stride: int,
    x_batch_stride: int,
    dvalues: int,
    threads: int,
    /,
) -> None: ...
def expand_f32(isa: int, bitmap: Bitmap, values: int, dense: int, threads: int, /) -> None: ...
def compress_f32(isa: int, bitmap: Bitmap, dense: int, values: int, threads: int, /) -> None: ...
def take_output_f32(shape: Sequence[int], /) -> Tensor: ...
def spmm_f32(
    isa: int,
    rows: int,
    columns: int,
    batch: int,
    crow_indices: int,
    col_indices: int,
    values: int,
    bias: int,
    x: int,
    x_feature_stride: int,
    x_batch_stride: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def sddmm_f32(
    isa: int,
    rows: int,
    columns: int,
    batch: int,
    crow_indices: int,
    col_indices: int,
    dy: int,
    dy_feature_stride: int,
    dy_batch_stride: int,
    x: int,
    x_feature_stride: int,
    x_batch_stride: int,
    dvalues: int,
    threads: int,
    /,
) -> None: ...

spmm_f64 = spmm_f32
spmm_bf16 = spmm_f32
make_plan_f64 = make_plan_f32
make_plan_bf16 = make_plan_f32
planned_spmm_f64 = planned_spmm_f32
planned_spmm_bf16 = planned_spmm_f32
bitmap_spmm_f64 = bitmap_spmm_f32
bitmap_spmm_bf16 = bitmap_spmm_f32
sddmm_f64 = sddmm_f32
sddmm_bf16 = sddmm_f32
tiled_sddmm_f64 = tiled_sddmm_f32
tiled_sddmm_bf16 = tiled_sddmm_f32
backward_f64 = backward_f32
backward_bf16 = backward_f32
bitmap_backward_f64 = bitmap_backward_f32
bitmap_backward_bf16 = bitmap_backward_f32
filled_spmm_f64 = filled_spmm_f32
filled_spmm_bf16 = filled_spmm_f32
bitmap_dx_f64 = bitmap_dx_f32
bitmap_dx_bf16 = bitmap_dx_f32
bitmap_dvalues_f64 = bitmap_dvalues_f32
bitmap_dvalues_bf16 = bitmap_dvalues_f32
filled_dx_f32 = bitmap_dx_f32
filled_dx_f64 = bitmap_dx_f32
filled_dx_bf16 = bitmap_dx_f32
filled_dvalues_f32 = bitmap_dvalues_f32
filled_dvalues_f64 = bitmap_dvalues_f32
filled_dvalues_bf16 = bitmap_dvalues_f32
expand_f64 = expand_f32
expand_bf16 = expand_f32
compress_f64 = compress_f32
compress_bf16 = compress_f32
take_output_f64 = take_output_f32
take_output_bf16 = take_output_f32

# Sparse rows.
def rows_fit(rows: int, nnz: int, columns: int, crow_indices: int, indices: int, /) -> bool: ...
def count_indices(nnz: int, columns: int, indices: int, counts: int, /) -> None: ...
def rows_matmul_f32(
    isa: int,
    rows: int,
    width: int,
    crow_indices: int,
    indices: int,
    values: int,
    weight: int,
    weight_stride: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def rows_written_out_f32(
    rows: int, columns: int, crow_indices: int, indices: int, values: int, dense: int, threads: int, /
) -> None: ...
def rows_picked_f32(
    rows: int, columns: int, crow_indices: int, indices: int, dense: int, picked: int, threads: int, /
) -> None: ...
def rows_dots_f32(
    isa: int,
    rows: int,
    width: int,
    crow_indices: int,
    indices: int,
    dy: int,
    dy_stride: int,
    weight: int,
    weight_stride: int,
    dots: int,
    threads: int,
    /,
) -> None: ...
def rows_weight_gradient_f32(
    isa: int,
    rows: int,
    columns: int,
    width: int,
    crow_indices: int,
    indices: int,
    values: int,
    dy: int,
    dy_stride: int,
    gradient: int,
    gradient_stride: int,
    add: bool,
    threads: int,
    /,
) -> None: ...
def sparse_matmul_f32(
    isa: int,
    rows: int,
    columns: int,
    width: int,
    crow_indices: int,
    indices: int,
    values: int,
    w_crow_indices: int,
    w_indices: int,
    w_values: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def sparse_dots_f32(
    isa: int,
    rows: int,
    columns: int,
    width: int,
    crow_indices: int,
    indices: int,
    dy: int,
    dy_stride: int,
    w_crow_indices: int,
    w_indices: int,
    w_values: int,
    dots: int,
    threads: int,
    /,
) -> None: ...
def sparse_weight_gradient_f32(
    isa: int,
    rows: int,
    columns: int,
    width: int,
    crow_indices: int,
    indices: int,
    values: int,
    dy: int,
    dy_stride: int,
    w_crow_indices: int,
    w_indices: int,
    gradient: int,
    threads: int,
    /,
) -> None: ...
def topk_f32(
    isa: int,
    rows: int,
    columns: int,
    k: int,
    x: int,
    x_stride: int,
    values: int,
    indices: int,
    threads: int,
    /,
) -> None: ...
def batch_topk_f32(
    isa: int,
    rows: int,
    columns: int,
    k: int,
    x: int,
    x_stride: int,
    crow_indices: int,
    indices: int,
    values: int,
    threads: int,
    /,
) -> None: ...
def count_above_f32(
    isa: int,
    rows: int,
    columns: int,
    x: int,
    x_stride: int,
    thresholds: int,
    crow_indices: int,
    threads: int,
    /,
) -> int: ...
def take_above_f32(
    isa: int,
    rows: int,
    columns: int,
    x: int,
    x_stride: int,
    thresholds: int,
    crow_indices: int,
    indices: int,
    values: int,
    threads: int,
    /,
) -> None: ...
def encode_topk_f32(
    isa: int,
    batch: int,
    width: int,
    rows: int,
    k: int,
    x: int,
    x_feature_stride: int,
    x_batch_stride: int,
    weight: int,
    weight_stride: int,
    bias: int,
    values: int,
    indices: int,
    threads: int,
    /,
) -> None: ...

rows_matmul_f64 = rows_matmul_f32
rows_matmul_bf16 = rows_matmul_f32
rows_written_out_f64 = rows_written_out_f32
rows_written_out_bf16 = rows_written_out_f32
rows_picked_f64 = rows_picked_f32
rows_picked_bf16 = rows_picked_f32
rows_dots_f64 = rows_dots_f32
rows_dots_bf16 = rows_dots_f32
rows_weight_gradient_f64 = rows_weight_gradient_f32
rows_weight_gradient_bf16 = rows_weight_gradient_f32
sparse_matmul_f64 = sparse_matmul_f32
sparse_matmul_bf16 = sparse_matmul_f32
sparse_dots_f64 = sparse_dots_f32
sparse_dots_bf16 = sparse_dots_f32
sparse_weight_gradient_f64 = sparse_weight_gradient_f32
sparse_weight_gradient_bf16 = sparse_weight_gradient_f32
topk_f64 = topk_f32
topk_bf16 = topk_f32
batch_topk_f64 = batch_topk_f32
batch_topk_bf16 = batch_topk_f32
count_above_f64 = count_above_f32
count_above_bf16 = count_above_f32
take_above_f64 = take_above_f32
take_above_bf16 = take_above_f32
encode_topk_f64 = encode_topk_f32
encode_topk_bf16 = encode_topk_f32

# int8 values.
def bitmap_int8_spmm_f32(
    isa: int,
    bitmap: Bitmap,
    batch: int,
    values: int,
    scales: int,
    bias: int,
    x: int,
    x_feature_stride: int,
    x_batch_stride: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def planned_int8_spmm_f32(
    isa: int,
    plan: Plan,
    batch: int,
    values: int,
    scales: int,
    bias: int,
    x: int,
    x_feature_stride: int,
    x_batch_stride: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def make_convolution_plan_f32(
    isa: int,
    sizes: Sequence[int],
    input_gradient: bool,
    crow_indices: int,
    col_indices: int,
    threads: int,
    /,
) -> ConvolutionPlan: ...
def make_convolution_tiles_f32(
    isa: int, sizes: Sequence[int], crow_indices: int, col_indices: int, threads: int, /
) -> ConvolutionTiles: ...
def convolve_f32(
    isa: int,
    plan: ConvolutionPlan,
    sizes: Sequence[int],
    images: int,
    values: int,
    bias: int,
    x: int,
    x_strides: Sequence[int],
    y: int,
    y_strides: Sequence[int],
    threads: int,
    /,
) -> None: ...
def convolution_dx_f32(
    isa: int,
    plan: ConvolutionPlan,
    sizes: Sequence[int],
    images: int,
    values: int,
    dy: int,
    dy_strides: Sequence[int],
    dx: int,
    dx_strides: Sequence[int],
    threads: int,
    /,
) -> None: ...
def convolution_dvalues_f32(
    isa: int,
    tiles: ConvolutionTiles,
    sizes: Sequence[int],
    images: int,
    dy: int,
    dy_strides: Sequence[int],
    x: int,
    x_strides: Sequence[int],
    dvalues: int,
    threads: int,
    /,
) -> None: ...

int8_dots_f32 = bitmap_int8_spmm_f32
int8_dots_f64 = bitmap_int8_spmm_f32
int8_dots_bf16 = bitmap_int8_spmm_f32
bitmap_int8_spmm_f64 = bitmap_int8_spmm_f32
bitmap_int8_spmm_bf16 = bitmap_int8_spmm_f32
planned_int8_spmm_f64 = planned_int8_spmm_f32
planned_int8_spmm_bf16 = planned_int8_spmm_f32
make_convolution_plan_f64 = make_convolution_plan_f32
make_convolution_plan_bf16 = make_convolution_plan_f32
make_convolution_tiles_f64 = make_convolution_tiles_f32
make_convolution_tiles_bf16 = make_convolution_tiles_f32
convolve_f64 = convolve_f32
convolve_bf16 = convolve_f32
convolution_dx_f64 = convolution_dx_f32
convolution_dx_bf16 = convolution_dx_f32
convolution_dvalues_f64 = convolution_dvalues_f32
convolution_dvalues_bf16 = convolution_dvalues_f32
