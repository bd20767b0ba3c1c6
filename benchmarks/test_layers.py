"""A layer in every form, forward and training step, at the shapes of the bars.

Run with: .venv/bin/python -m pytest benchmarks (or make bench)
Each result is checked against float64 first. The contenders of a case run one after another, so look at `bars.py`,
which interleaves them, before you believe a ratio near 1. SparseLab is compared where it is installed; its threads are
its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from contenders import CONTENDERS, SHAPES, Refused
from measure import check_forward, check_step, dtype_name, training_step
from offpath.kernels import KernelError


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(("inputs", "outputs", "batch"), SHAPES)
@pytest.mark.parametrize("what", ["forward", "training step"])
def test_layer(
    benchmark: Any,
    what: str,
    inputs: int,
    outputs: int,
    batch: int,
    dtype: torch.dtype,
    sparsity: float,
    contender: str,
) -> None:
    benchmark.group = f"{what}, {inputs} -> {outputs}, batch {batch}, {sparsity:.0%}, {dtype_name(dtype)}"
    benchmark.name = contender
    torch.manual_seed(0)
    x, dy = torch.randn(batch, inputs, dtype=dtype), torch.randn(batch, outputs, dtype=dtype)
    try:
        made = CONTENDERS[contender](inputs, outputs, sparsity, dtype)
        check_forward(made, x)
        check_step(made, x, dy)
    except (KernelError, Refused) as error:
        pytest.skip(f"refused: {error}")
    if what == "forward":
        with torch.no_grad():
            benchmark(made.layer, x)
    else:
        benchmark(training_step, made.layer, x.requires_grad_(), dy)
