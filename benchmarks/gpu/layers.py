"""Times of `SparseLinear` as users call it: what the cost model chooses, beside its dense method and `nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
from torch import nn

from contenders import Contender, of_sparse_linear
from gpu.check import summed_in_float32
from gpu.jobs import Job, Raced, Sides, Wanted
from gpu.timing import Call, Effort
from measure import check_forward, check_step, dtype_name, training_step
from offpath import SparseLinear
from offpath.ops import forced_methods
from verdicts import Figure

LINEAR, DENSE_METHOD, OURS = "nn.Linear", "its dense method", "offpath"
CHOICE_BAR = 0.97  # of issue 7: never more than 3 % slower than the dense path
WIDTH, QUICK_WIDTH = 4096, 512
SPARSITIES = (0.5, 0.9, 0.98)
TOKENS = (4096, 512, 64, 1)
DTYPES = (torch.float32, torch.bfloat16)


def jobs(quick: bool, effort: Effort, device: torch.device) -> Iterator[Job]:
    width, sparsities, tokens = (QUICK_WIDTH, (0.9,), (64,)) if quick else (WIDTH, SPARSITIES, TOKENS)
    for dtype in DTYPES:
        for sparsity in sparsities:
            for count in tokens:
                for what, measure in (("forward", _forward), ("training", _step)):
                    row = f"{dtype_name(dtype)} {width} -> {width}, {count} tokens, {what}"
                    wanted = tuple(
                        Wanted(Figure(f"SparseLinear over {over}", row, f"{sparsity:.0%}", bar), OURS, (over,))
                        for over, bar in ((DENSE_METHOD, CHOICE_BAR), (LINEAR, None))
                    )
                    kernels = "spmm", "sddmm", "expand", "compress"
                    yield Job(wanted, kernels, partial(measure, width, sparsity, count, dtype, effort, device))


@lru_cache(maxsize=1)
def _contender(width: int, sparsity: float, dtype: torch.dtype, device: torch.device) -> Contender:
    return of_sparse_linear(SparseLinear(width, width, sparsity=sparsity, dtype=dtype).to(device))


def _forward(
    width: int, sparsity: float, tokens: int, dtype: torch.dtype, effort: Effort, device: torch.device
) -> Raced:
    sparse = _contender(width, sparsity, dtype, device)
    layer = sparse.layer
    x = torch.randn(tokens, layer.in_features, dtype=dtype, device=layer.values.device)
    with summed_in_float32():
        check_forward(sparse, x)
    with torch.no_grad():
        return _sides(layer, lambda one: partial(one, x)).race(effort)


def _step(width: int, sparsity: float, tokens: int, dtype: torch.dtype, effort: Effort, device: torch.device) -> Raced:
    sparse = _contender(width, sparsity, dtype, device)
    layer = sparse.layer
    draw = partial(torch.randn, dtype=dtype, device=layer.values.device)
    x, dy = draw(tokens, layer.in_features), draw(tokens, layer.out_features)
    with summed_in_float32():
        check_step(sparse, x, dy)
    x.requires_grad_()
    return _sides(layer, lambda one: partial(training_step, one, x, dy)).race(effort, graphs=False)


def _sides(layer: SparseLinear, call: Callable[[nn.Module], Call]) -> Sides:
    linear = nn.Linear(layer.in_features, layer.out_features, dtype=layer.values.dtype, device=layer.values.device)
    run = call(layer)

    def densely() -> object:
        with forced_methods(forward="dense", dx="dense", dvalues="dense"):
            return run()

    return Sides({LINEAR: [call(linear)], DENSE_METHOD: [densely], OURS: [run]})
