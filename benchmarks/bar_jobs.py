"""The bars that are set for offpath's speed, and how each of them is measured."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn

import offpath
from contenders import CONTENDERS, SHAPES, Contender, of_sparse_linear
from measure import Timing, check_forward, check_gradients, check_step, dtype_name, interleaved, training_step
from offpath.cost import this_machine
from offpath.kernels import cpu
from verdicts import Figure, break_even

FP32, BF16 = torch.float32, torch.bfloat16
Shape = tuple[int, int, int]
Pair = tuple[Timing, Timing]  # of the slower (dense, or the rival), and of offpath

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
FORWARD, STEP = "forward", "training"
LAYER_BARS = {
    (FP32, FORWARD): (1.7, 2.5, 3.2, 5, 8),
    (FP32, STEP): (1.3, 2.0, 2.7, 4.5, 7),
    (BF16, FORWARD): (1.2, 1.9, 2.4, 3.8, 6),
    (BF16, STEP): (0.95, 1.4, 1.9, 3, 5),
}
LOW_SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4)  # with SPARSITIES, the grid on which the break-even is looked for
BREAK_EVEN_BARS = {FP32: 0.35, BF16: 0.50}
LOWEST_RATIO_BAR = 0.95
BATCH_1_BARS: dict[torch.dtype, dict[float, float | None]] = {
    FP32: {0.5: 1.2, 0.7: None, 0.9: 4.5},
    BF16: {0.5: 2.5, 0.7: 3.5, 0.9: 6},
}
MLP_BATCH, MLP_SPARSITY, MLP_BAR = 256, 0.9, 3.5
SPARSELAB_SPARSITIES, SPARSELAB_BAR = (0.8, 0.9, 0.95), 2.5
AVX2_SPARSITY, AVX2_BAR = 0.9, 3.0

LAYERS, LOW, BREAK_EVEN = "Layers", "Layers at low sparsity", "Break-even and lowest ratio of all sparsities"


@dataclass(frozen=True)
class Effort:
    """How much is measured; the default is everything that a bar is set for."""

    rounds: int = 5  # of each pass
    passes: int = 3
    sample_seconds: float = 0.02
    shapes: tuple[Shape, ...] = SHAPES
    sparsities: tuple[float, ...] = SPARSITIES + LOW_SPARSITIES
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    batch_1_size: int = 4096
    mlp_width: int = 1024

    @property
    def torch_dtypes(self) -> list[torch.dtype]:
        """`dtypes` as torch has them."""
        return [dtype for dtype in (FP32, BF16) if dtype_name(dtype) in self.dtypes]

    def times(self, calls: dict[str, Callable[[], object]], own_pools: bool = False) -> dict[str, Timing]:
        return interleaved(calls, self.rounds, self.sample_seconds, own_pools)


QUICK = Effort(rounds=5, passes=1, sample_seconds=0.005, shapes=SHAPES[:1], sparsities=(0.5, 0.7, 0.9, 0.0, 0.3))


@dataclass(frozen=True)
class Job:
    """Figures that are measured together, still without values, and the run that gives a pair of times for each."""

    figures: tuple[Figure, ...]
    measure: Callable[[], Sequence[Pair]]


def layer_jobs(effort: Effort) -> Iterator[Job]:
    """Forward and training step (y, dX, dW, db) against `nn.Linear` of the same dtype, called the same way."""
    for dtype, shape, sparsity in itertools.product(effort.torch_dtypes, effort.shapes, effort.sparsities):
        figures = []
        for what in (FORWARD, STEP):
            bar = dict(zip(SPARSITIES, LAYER_BARS[dtype, what], strict=True)).get(sparsity)
            section, row = LOW if bar is None else LAYERS, f"{dtype_name(dtype)} {in_words(shape)} {what}"
            figures.append(Figure(section, row, percent(sparsity), bar))
        yield Job(tuple(figures), partial(_layer, effort, shape, sparsity, dtype))


def batch_1_jobs(effort: Effort) -> Iterator[Job]:
    """Forward of one sample, against the better of dense fp32 and dense bf16.

    Called again and again, so that weights which fit into a cache stay there, as those of a small model do.
    """
    size = effort.batch_1_size
    for dtype in effort.torch_dtypes:
        for sparsity, bar in BATCH_1_BARS[dtype].items():
            row = f"{dtype_name(dtype)} {size} -> {size} forward"
            figure = Figure("Batch 1, over the better of dense fp32 and bf16", row, percent(sparsity), bar)
            yield Job((figure,), partial(_batch_1, effort, sparsity, dtype))


def mlp_jobs(effort: Effort) -> Iterator[Job]:
    """A whole training step of a network: forward, loss, backward, Adam."""
    section = f"MLP of 3 layers, {effort.mlp_width} wide, batch {MLP_BATCH}, a step with the optimizer"
    for fused, bar in ((False, MLP_BAR), (True, None)):
        figure = Figure(section, f"fp32 Adam{', fused' if fused else ''}", percent(MLP_SPARSITY), bar)
        yield Job((figure,), partial(_mlp, effort, fused))


def sparselab_jobs(effort: Effort) -> Iterator[Job]:
    """The training step against SparseLab 0.2.2."""
    for shape in effort.shapes:
        figures = tuple(
            Figure("Training step over SparseLab's", f"fp32 {in_words(shape)}", percent(sparsity), SPARSELAB_BAR)
            for sparsity in SPARSELAB_SPARSITIES
        )
        # SparseLab brings a second OpenMP runtime, which the other measurements should not share a process with.
        yield Job(figures, partial(_in_child, {}, _over_sparselab, effort, shape))


def avx2_jobs(effort: Effort) -> Iterator[Job]:
    """The forward product held to AVX2, against a dense layer that is not; none on a processor without AVX2."""
    if not cpu.isas().get("avx2"):
        return
    for shape in effort.shapes:
        figure = Figure("OFFPATH_ISA=avx2", f"fp32 {in_words(shape)} forward", percent(AVX2_SPARSITY), AVX2_BAR)
        yield Job((figure,), partial(_in_child, {"OFFPATH_ISA": "avx2"}, _on_avx2, effort, shape))


JOBS = {
    "layers": layer_jobs,
    "batch-1": batch_1_jobs,
    "mlp": mlp_jobs,
    "sparselab": sparselab_jobs,
    "avx2": avx2_jobs,
}


def break_even_figures(effort: Effort, measured: Sequence[Figure]) -> list[Figure]:
    """What follows from the ratios of the layers, for those measured at every sparsity."""
    sparsity_of = {percent(sparsity): sparsity for sparsity in effort.sparsities}
    found = []
    for dtype, shape in itertools.product(effort.torch_dtypes, effort.shapes):
        row = f"{dtype_name(dtype)} {in_words(shape)}"
        wanted = (
            (STEP, "break-even, training", BREAK_EVEN_BARS[dtype], True),
            (STEP, "lowest, training", LOWEST_RATIO_BAR, False),
            (FORWARD, "lowest, forward", LOWEST_RATIO_BAR, False),
        )
        for what, column, bar, at_most in wanted:
            line = [f for f in measured if f.section in (LAYERS, LOW) and f.row == f"{row} {what}"]
            if len(line) < len(sparsity_of):
                continue  # interrupted before its end
            refused = next((f.refused for f in line if f.refused is not None), None)
            points = [(sparsity_of[f.column], f.value) for f in line if f.value is not None]
            value = None
            if refused is None:
                value = break_even(points) if at_most else min(ratio for _, ratio in points)
            unit = "%" if at_most else "x"
            found.append(Figure(BREAK_EVEN, row, column, bar, value, refused=refused, unit=unit, at_most=at_most))
    return found


def percent(sparsity: float) -> str:
    return f"{sparsity * 100:g} %"


def in_words(shape: Shape) -> str:
    inputs, outputs, batch = shape
    return f"{inputs} -> {outputs}, {batch}"


def _operands(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    inputs, outputs, batch = shape
    return torch.randn(batch, inputs, dtype=dtype), torch.randn(batch, outputs, dtype=dtype)


def _forward_pair(effort: Effort, dense: Contender, sparse: Contender, x: Tensor) -> Pair:
    with torch.no_grad():
        times = effort.times({c.name: partial(c.layer, x) for c in (dense, sparse)})
    return times[dense.name], times[sparse.name]


def _step_pair(effort: Effort, slow: Contender, fast: Contender, x: Tensor, dy: Tensor, own_pools: bool) -> Pair:
    x = x.detach().requires_grad_()
    times = effort.times({c.name: partial(training_step, c.layer, x, dy) for c in (slow, fast)}, own_pools)
    return times[slow.name], times[fast.name]


def _layer(effort: Effort, shape: Shape, sparsity: float, dtype: torch.dtype) -> list[Pair]:
    inputs, outputs, _ = shape
    x, dy = _operands(shape, dtype)
    dense, sparse = (CONTENDERS[name](inputs, outputs, sparsity, dtype) for name in ("dense", "offpath"))
    check_forward(sparse, x)
    check_step(sparse, x, dy)
    return [_forward_pair(effort, dense, sparse, x), _step_pair(effort, dense, sparse, x, dy, own_pools=False)]


def _batch_1(effort: Effort, sparsity: float, dtype: torch.dtype) -> list[Pair]:
    size = effort.batch_1_size
    x = torch.randn(1, size)
    sparse = CONTENDERS["offpath"](size, size, sparsity, dtype)
    check_forward(sparse, x.to(dtype))
    calls: dict[str, Callable[[], object]] = {
        dtype_name(d): partial(CONTENDERS["dense"](size, size, sparsity, d).layer, x.to(d)) for d in (FP32, BF16)
    }
    with torch.no_grad():
        times = effort.times({**calls, "offpath": partial(sparse.layer, x.to(dtype))})
    return [(min((times[name] for name in calls), key=lambda timing: timing.median_seconds), times["offpath"])]


def _mlp(effort: Effort, fused: bool) -> list[Pair]:
    width = effort.mlp_width
    dense = nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
    )
    sparse = copy.deepcopy(dense)
    offpath.sparsify(sparse, MLP_SPARSITY, seed=0)
    x, target = torch.randn(MLP_BATCH, width), torch.randn(MLP_BATCH, width)
    _check_mlp(sparse, x, target)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()

    models = {"dense": dense, "offpath": sparse}
    times = effort.times(
        {name: partial(train, m, torch.optim.Adam(m.parameters(), fused=fused)) for name, m in models.items()}
    )
    return [(times["dense"], times["offpath"])]


def _check_mlp(model: nn.Sequential, x: Tensor, target: Tensor) -> None:
    """Every layer against float64, at the inputs and gradients that it really meets inside the network."""
    activations = [x]
    for layer in model:
        activations.append(layer(activations[-1]))
        activations[-1].retain_grad()
    nn.functional.mse_loss(activations[-1], target).backward()
    for layer, before, after in zip(model, activations, activations[1:], strict=False):
        if not isinstance(layer, nn.ReLU):
            check_gradients(of_sparse_linear(layer), before, after, after.grad)


def _over_sparselab(effort: Effort, shape: Shape) -> list[Pair]:
    inputs, outputs, _ = shape
    x, dy = _operands(shape, FP32)
    pairs = []
    # All of SparseLab's layers at once: it finds a weight's transpose by id(), which the next layer inherits from one
    # that is gone, and raises IndexError then.
    rivals = [CONTENDERS["sparselab"](inputs, outputs, sparsity, FP32) for sparsity in SPARSELAB_SPARSITIES]
    for rival, sparsity in zip(rivals, SPARSELAB_SPARSITIES, strict=True):
        ours = CONTENDERS["offpath"](inputs, outputs, sparsity, FP32)
        check_step(rival, x, dy)
        check_step(ours, x, dy)
        pairs.append(_step_pair(effort, rival, ours, x, dy, own_pools=True))
    return pairs


def _on_avx2(effort: Effort, shape: Shape) -> list[Pair]:
    inputs, outputs, _ = shape
    if (ran := this_machine().backend) != "cpu:avx2":
        raise RuntimeError(f"expected the products to run on cpu:avx2, got {ran}")
    x, _ = _operands(shape, FP32)
    dense, sparse = (CONTENDERS[name](inputs, outputs, AVX2_SPARSITY, FP32) for name in ("dense", "offpath"))
    check_forward(sparse, x)
    return [_forward_pair(effort, dense, sparse, x)]


def _in_child(environment: dict[str, str], measure: Callable[..., list[Pair]], *arguments: object) -> list[Pair]:
    """The result of `measure` in a fresh process with the same number of threads."""
    # SparseLab's own pool takes its size from OMP_NUM_THREADS, when it is loaded.
    environment = {**environment, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    context = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, environment), ProcessPoolExecutor(1, context, _seed) as child:
        return child.submit(measure, *arguments).result()


def _seed() -> None:
    torch.manual_seed(0)
