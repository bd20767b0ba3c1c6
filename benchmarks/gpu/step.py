"""Times of a training step of one wide layer: y, dx and the gradient of the values, beside dense layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gpu.check import sums
from gpu.draws import dense, numbers, pattern, transposed
from gpu.jobs import Job, Raced, Sides, Wanted, require
from gpu.rivals import csr
from gpu.timing import Call, Effort, copies
from offpath.cost.bounds import Expected
from offpath.kernels.gpu.bucketed import plan, planned_spmm, tiled_sddmm, tiles
from offpath.kernels.gpu.buckets import Buckets
from offpath.kernels.gpu.expand import Bitmap, bitmap, compress, expand
from offpath.kernels.gpu.regions import Regions
from offpath.kernels.gpu.sparse_weight import sddmm, spmm
from verdicts import Figure

SECTION = "Training step of a layer"
FP32, TF32, BF16 = "dense fp32", "dense fp32 with TF32", "dense bf16"
OURS_FP32, OURS_BF16, OURS_EXPANDED = "offpath fp32", "offpath bf16", "offpath bf16, written out"
BUCKETED_FP32, BUCKETED_BF16 = "offpath fp32, bucketed", "offpath bf16, bucketed"
TURNED_FP32, TURNED_BF16 = "offpath fp32, tokens in rows", "offpath bf16, tokens in rows"
CSR = "torch.sparse CSR fp32"
Bars = dict[tuple[str, str], dict[float, float]]
FP32_BARS, BF16_BARS = {0.9: 1.3, 0.95: 2.5}, {0.98: 1.2}  # of issue 7, for an H200
BARS: Bars = {
    (OURS_FP32, FP32): FP32_BARS,
    (BUCKETED_FP32, FP32): FP32_BARS,
    (OURS_BF16, BF16): BF16_BARS,
    (BUCKETED_BF16, BF16): BF16_BARS,
}
SPARSITIES = (0.9, 0.95, 0.98, 0.99)
Size = tuple[int, int]  # width, tokens
SIZE, QUICK_SIZE = (4096, 4096), (512, 256)
CHECKED = 48  # features that are compared with float64


@dataclass(frozen=True)
class Plans:
    """What is known of a pattern before its products."""

    weight: Buckets
    transpose: Buckets
    regions: Regions


@dataclass(frozen=True)
class Layer:
    """A sparse weight and what a step has: activations stored by feature, as sparse products want them."""

    crow_indices: Tensor
    col_indices: Tensor
    transpose: tuple[Tensor, Tensor, Tensor]
    values: Tensor
    x: Tensor  # [inputs, tokens]
    dy: Tensor  # [outputs, tokens]

    def step(self, by_token: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """y [outputs, tokens], dx [inputs, tokens], dvalues; `by_token` stores both as a dense layer wants them."""
        crow_indices, col_indices, permutation = self.transpose
        x, dy = self.x.t(), self.dy.t()
        return (
            spmm(self.crow_indices, self.col_indices, self.values, x, None, not by_token).t(),
            spmm(crow_indices, col_indices, self.values[permutation], dy, None, not by_token).t(),
            sddmm(self.crow_indices, self.col_indices, dy, x),
        )

    def bucketed_step(self, plans: Plans) -> tuple[Tensor, Tensor, Tensor]:
        """The same over plans, which stand as long as the connections do."""
        x, dy = self.x.t(), self.dy.t()
        return (
            planned_spmm(plans.weight, self.values, x, None, feature_major=True).t(),
            planned_spmm(plans.transpose, self.values, dy, None, feature_major=True).t(),
            tiled_sddmm(plans.regions, dy, x),
        )

    def plans(self) -> Plans:
        """What `bucketed_step` wants."""
        (width, _), dtype = self.x.shape, self.values.dtype
        crow_indices, col_indices, permutation = self.transpose
        return Plans(
            plan(self.crow_indices, self.col_indices, width, dtype),
            plan(crow_indices, col_indices, self.dy.shape[0], dtype, permutation),
            tiles(self.crow_indices, self.col_indices, width),
        )

    @property
    def read_bytes(self) -> int:
        return self.x.nbytes + self.dy.nbytes

    def stored_by_token(self) -> Layer:
        """The same with x and dy as a dense layer has them: [tokens, features]."""
        return replace(self, x=self.x.t().contiguous().t(), dy=self.dy.t().contiguous().t())

    def cast(self, dtype: torch.dtype) -> Layer:
        return replace(self, **{name: getattr(self, name).to(dtype) for name in ("values", "x", "dy")})


ROW_WISE = (
    (OURS_FP32, FP32),
    (OURS_FP32, TF32),
    (TURNED_FP32, FP32),
    (OURS_BF16, BF16),
    (TURNED_BF16, BF16),
    (OURS_EXPANDED, BF16),
    (CSR, FP32),
)
OVER_PLANS = (BUCKETED_FP32, FP32), (BUCKETED_BF16, BF16)
ROW_WISE_KERNELS = "spmm", "sddmm", "bitmap", "expand", "compress"
KERNELS_OVER_PLANS = "planned_spmm", "tiled_sddmm"


def jobs(quick: bool, effort: Effort, device: torch.device) -> Iterator[Job]:
    """Those over plans last: what goes wrong in a kernel that no GPU has run yet ends nothing but them."""
    size = QUICK_SIZE if quick else SIZE
    for measure, pairs, kernels in (
        (_row_wise, ROW_WISE, ROW_WISE_KERNELS),
        (_over_plans, OVER_PLANS, KERNELS_OVER_PLANS),
    ):
        for sparsity in SPARSITIES[1:2] if quick else SPARSITIES:
            wanted = tuple(
                Wanted(
                    Figure(SECTION, f"{ours} over {over}", f"{sparsity:.0%}", BARS.get((ours, over), {}).get(sparsity)),
                    ours,
                    (over,),
                )
                for ours, over in pairs
            )
            yield Job(wanted, kernels, partial(measure, size, sparsity, effort, device))


def _drawn(size: Size, sparsity: float, device: torch.device) -> tuple[Layer, Layer]:
    """A layer in float32, and the same in bfloat16."""
    width, tokens = size
    crow_indices, col_indices = pattern(width, width, 1 - sparsity, device)
    draw = partial(numbers, dtype=torch.float32, device=device)
    layer = Layer(
        crow_indices,
        col_indices,
        transposed(crow_indices, col_indices, width),
        draw(col_indices.numel()),
        draw(width, tokens),
        draw(width, tokens),
    )
    return layer, layer.cast(torch.bfloat16)


def _require_step(layer: Layer, results: tuple[Tensor, Tensor, Tensor]) -> None:
    for part, result, right in zip(("y", "dx", "dvalues"), results, _right(layer), strict=True):
        require(f"{part} in {layer.values.dtype}", result, right)


def _dense_operands(layer: Layer) -> list[tuple[Tensor, ...]]:
    width = layer.x.shape[0]
    weight = dense(layer.crow_indices, layer.col_indices, layer.values, width)
    operands = weight, layer.x.t().contiguous(), layer.dy.t().contiguous()
    return copies(operands, sum(one.nbytes for one in operands))


def _row_wise(size: Size, sparsity: float, effort: Effort, device: torch.device) -> Raced:
    layer, half = _drawn(size, sparsity, device)
    for one in (layer, half):
        _require_step(one, one.step())
    wide = _dense_operands(layer)
    halves = [tuple(one.bfloat16() for one in each) for each in wide]
    prepared = bitmap(layer.crow_indices, layer.col_indices, size[0])
    sides = Sides(
        {
            FP32: [_with_tf32(False, partial(dense_step, *each)) for each in wide],
            TF32: [_with_tf32(True, partial(dense_step, *each)) for each in wide],
            BF16: [partial(dense_step, *each) for each in halves],
            OURS_FP32: [one.step for one in copies(layer, layer.read_bytes)],
            OURS_BF16: [one.step for one in copies(half, half.read_bytes)],
            TURNED_FP32: _turned(layer),
            TURNED_BF16: _turned(half),
            OURS_EXPANDED: [partial(_written_out, prepared, half.values, *each[1:]) for each in halves],
        }
    )
    raced = sides.race(effort)
    rival = Sides({FP32: sides.calls[FP32]}, raced.refused)
    rival.offer(CSR, lambda: [_csr_step(layer, size[0])])
    if CSR in rival.calls:
        raced.times[CSR] = rival.race(effort, graphs=False).times[CSR]
    return raced


def _over_plans(size: Size, sparsity: float, effort: Effort, device: torch.device) -> Raced:
    layer, half = _drawn(size, sparsity, device)
    for one in (layer, half):
        _require_step(one, one.bucketed_step(one.plans()))
    wide = _dense_operands(layer)
    sides = {
        FP32: [_with_tf32(False, partial(dense_step, *each)) for each in wide],
        BF16: [partial(dense_step, *(one.bfloat16() for one in each)) for each in wide],
        BUCKETED_FP32: _bucketed(layer),
        BUCKETED_BF16: _bucketed(half),
    }
    return Sides(sides).race(effort)


def dense_step(weight: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and the weight's gradient, of `x` [tokens, inputs] and `dy` [tokens, outputs]."""
    return x @ weight.t(), dy @ weight, dy.t() @ x


def _bucketed(layer: Layer) -> list[Call]:
    plans = layer.plans()
    return [partial(one.bucketed_step, plans) for one in copies(layer, layer.read_bytes)]


def _turned(layer: Layer) -> list[Call]:
    return [partial(one.step, True) for one in copies(layer.stored_by_token(), layer.read_bytes)]


def _written_out(prepared: Bitmap, values: Tensor, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight = expand(prepared, values)
    y, dx, gradient = dense_step(weight, x, dy)
    return y, dx, compress(prepared, gradient)


def _csr_step(layer: Layer, width: int) -> Call:
    matrix = csr(layer.crow_indices, layer.col_indices, layer.values, width)
    crow_indices, col_indices, permutation = layer.transpose
    transpose = csr(crow_indices, col_indices, layer.values[permutation], width)
    nothing = csr(layer.crow_indices, layer.col_indices, torch.zeros_like(layer.values), width)
    by_token = layer.x.t()
    return lambda: (matrix @ layer.x, transpose @ layer.dy, torch.sparse.sampled_addmm(nothing, layer.dy, by_token))


def _with_tf32(allowed: bool, call: Callable[[], object]) -> Call:
    def run() -> object:
        was = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = allowed
        try:
            return call()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = was

    return run


def _right(layer: Layer) -> tuple[Expected, Expected, Expected]:
    """A few features of y and dx, and the connections of a few outputs."""
    width, tokens = layer.x.shape
    device, dtype = layer.x.device, layer.values.dtype
    chosen = torch.randperm(width, device=device)[:CHECKED]
    matrix = dense(layer.crow_indices, layer.col_indices, layer.values, width).double()
    x, dy = layer.x.double(), layer.dy.double()
    found = []
    for rows, operand in ((matrix[chosen], x), (matrix.t()[chosen], dy)):
        right = sums(rows @ operand, rows.abs() @ operand.abs(), (rows != 0).sum(1, keepdim=True), dtype)
        found.append(Expected(right.exact, right.bound, (chosen,), (width, tokens)))
    output = torch.arange(width, device=device).repeat_interleave(layer.crow_indices.diff())
    slots = torch.isin(output, chosen).nonzero().flatten()
    one, other = dy[output[slots]], x[layer.col_indices[slots].long()]
    right = sums((one * other).sum(1), (one * other).abs().sum(1), torch.tensor(tokens, device=device), dtype)
    return found[0], found[1], Expected(right.exact, right.bound, (slots,), tuple(layer.values.shape))
