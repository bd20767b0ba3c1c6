from collections.abc import Sequence

from torch import Tensor

def isas() -> list[tuple[str, bool]]: ...
def calls(isa: int) -> int: ...
def pool_library() -> str: ...
def kept_scratch_bytes() -> int: ...
def digest(crow_indices: Tensor, col_indices: Tensor, /) -> int | None: ...

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

# Functions say False, or None, to operands that do not fit, which is looked at in C++.

# The products of layers.
def spmm(
    isa: int,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    threads: int,
    /,
) -> bool: ...
def sddmm(
    isa: int, crow_indices: Tensor, col_indices: Tensor, dy: Tensor, x: Tensor, dvalues: Tensor, threads: int, /
) -> bool: ...
def planned_spmm(
    isa: int,
    plan: Plan,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    feature_major: bool,
    threads: int,
    /,
) -> bool: ...
def filled_spmm(
    isa: int,
    bitmap: Bitmap,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    feature_major: bool,
    threads: int,
    /,
) -> bool: ...
def bitmap_spmm(
    isa: int, bitmap: Bitmap, values: Tensor, x: Tensor, bias: Tensor | None, y: Tensor, threads: int, /
) -> bool: ...
def bitmap_dx(isa: int, bitmap: Bitmap, values: Tensor, dy: Tensor, dx: Tensor, threads: int, /) -> bool: ...
def filled_dx(isa: int, bitmap: Bitmap, values: Tensor, dy: Tensor, dx: Tensor, threads: int, /) -> bool: ...
def tiled_sddmm(isa: int, tiles: Tiles, dy: Tensor, x: Tensor, dvalues: Tensor, threads: int, /) -> bool: ...
def bitmap_dvalues(isa: int, bitmap: Bitmap, dy: Tensor, x: Tensor, dvalues: Tensor, threads: int, /) -> bool: ...
def filled_dvalues(isa: int, bitmap: Bitmap, dy: Tensor, x: Tensor, dvalues: Tensor, threads: int, /) -> bool: ...
def backward(
    isa: int,
    transpose: Plan | None,
    tiles: Tiles | None,
    bitmap: Bitmap | None,
    values: Tensor,
    dy: Tensor,
    x: Tensor,
    dx: Tensor,
    feature_major: bool,
    dvalues: Tensor,
    dbias: Tensor,
    threads: int,
    /,
) -> bool: ...
def bitmap_backward(
    isa: int,
    bitmap: Bitmap,
    values: Tensor,
    dy: Tensor,
    x: Tensor,
    fills_dx: bool,
    fills_dvalues: bool,
    dx: Tensor,
    dvalues: Tensor,
    dbias: Tensor,
    threads: int,
    /,
) -> bool: ...
def expand(isa: int, bitmap: Bitmap, values: Tensor, dense: Tensor, threads: int, /) -> bool: ...
def compress(isa: int, bitmap: Bitmap, dense: Tensor, values: Tensor, threads: int, /) -> bool: ...

# What is made of a pattern.
def make_plan_f32(
    isa: int,
    crow_indices: Tensor,
    col_indices: Tensor,
    columns: int,
    permutation: Tensor | None,
    threads: int,
    /,
) -> Plan | None: ...
def make_tiles(crow_indices: Tensor, col_indices: Tensor, columns: int, threads: int, /) -> Tiles | None: ...
def make_bitmap(crow_indices: Tensor, col_indices: Tensor, columns: int, threads: int, /) -> Bitmap | None: ...
def write_columns(bitmap: Bitmap, col_indices: Tensor, threads: int, /) -> bool: ...
def take_output_f32(shape: Sequence[int], /) -> Tensor: ...

make_plan_f64 = make_plan_f32
make_plan_bf16 = make_plan_f32
take_output_f64 = take_output_f32
take_output_bf16 = take_output_f32

# Sparse rows.
def count_indices(indices: Tensor, counts: Tensor, /) -> bool: ...
def rows_matmul(
    isa: int, crow_indices: Tensor, indices: Tensor, values: Tensor, weight: Tensor, y: Tensor, threads: int, /
) -> bool: ...
def rows_dots(
    isa: int, crow_indices: Tensor, indices: Tensor, dy: Tensor, weight: Tensor, dots: Tensor, threads: int, /
) -> bool: ...
def rows_weight_gradient(
    isa: int,
    crow_indices: Tensor,
    indices: Tensor,
    values: Tensor,
    dy: Tensor,
    gradient: Tensor,
    add: bool,
    threads: int,
    /,
) -> bool: ...
def rows_written_out(crow_indices: Tensor, indices: Tensor, values: Tensor, dense: Tensor, threads: int, /) -> bool: ...
def rows_picked(crow_indices: Tensor, indices: Tensor, dense: Tensor, picked: Tensor, threads: int, /) -> bool: ...
def sparse_matmul(
    isa: int,
    crow_indices: Tensor,
    indices: Tensor,
    values: Tensor,
    w_crow_indices: Tensor,
    w_indices: Tensor,
    w_values: Tensor,
    y: Tensor,
    threads: int,
    /,
) -> bool: ...
def sparse_dots(
    isa: int,
    crow_indices: Tensor,
    indices: Tensor,
    dy: Tensor,
    w_crow_indices: Tensor,
    w_indices: Tensor,
    w_values: Tensor,
    dots: Tensor,
    threads: int,
    /,
) -> bool: ...
def sparse_weight_gradient(
    isa: int,
    crow_indices: Tensor,
    indices: Tensor,
    values: Tensor,
    dy: Tensor,
    w_crow_indices: Tensor,
    w_indices: Tensor,
    gradient: Tensor,
    threads: int,
    /,
) -> bool: ...

# Selections.
def topk(isa: int, x: Tensor, k: int, values: Tensor, indices: Tensor, threads: int, /) -> bool: ...
def batch_topk(
    isa: int, x: Tensor, k: int, crow_indices: Tensor, indices: Tensor, values: Tensor, threads: int, /
) -> bool: ...
def count_above(
    isa: int, x: Tensor, thresholds: Tensor | None, crow_indices: Tensor, threads: int, /
) -> int | None: ...
def take_above(
    isa: int,
    x: Tensor,
    thresholds: Tensor | None,
    crow_indices: Tensor,
    indices: Tensor,
    values: Tensor,
    threads: int,
    /,
) -> bool: ...
def encode_topk(
    isa: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    values: Tensor,
    indices: Tensor,
    threads: int,
    /,
) -> bool: ...

# int8 values.
def bitmap_int8_spmm(
    isa: int,
    bitmap: Bitmap,
    values: Tensor,
    scales: Tensor,
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    threads: int,
    /,
) -> bool: ...
def planned_int8_spmm(
    isa: int,
    plan: Plan,
    values: Tensor,
    scales: Tensor,
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    threads: int,
    /,
) -> bool: ...

filled_int8_spmm = bitmap_int8_spmm
int8_dots = bitmap_int8_spmm

# Convolutions.
def make_convolution_plan_f32(
    isa: int,
    sizes: Sequence[int],
    input_gradient: bool,
    crow_indices: Tensor,
    col_indices: Tensor,
    threads: int,
    /,
) -> ConvolutionPlan | None: ...
def make_convolution_tiles_f32(
    isa: int, sizes: Sequence[int], crow_indices: Tensor, col_indices: Tensor, threads: int, /
) -> ConvolutionTiles | None: ...
def convolve(
    isa: int,
    plan: ConvolutionPlan,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    threads: int,
    /,
) -> bool: ...
def convolution_dx(
    isa: int, plan: ConvolutionPlan, values: Tensor, dy: Tensor, dx: Tensor, threads: int, /
) -> bool: ...
def convolution_dvalues(
    isa: int, tiles: ConvolutionTiles, dy: Tensor, x: Tensor, dvalues: Tensor, threads: int, /
) -> bool: ...

make_convolution_plan_f64 = make_convolution_plan_f32
make_convolution_plan_bf16 = make_convolution_plan_f32
make_convolution_tiles_f64 = make_convolution_tiles_f32
make_convolution_tiles_bf16 = make_convolution_tiles_f32
