"""Int8 weights, sparse and dense: `Int8SparseLinear` against `SparseLinear`, `nn.Linear` and torch's own int8 layers.

Run with: .venv/bin/python benchmarks/int8.py [--out FILE] [--rounds N]
For every layer, batch and sparsity: microseconds of each contender, all measured in turns, and how many times faster
the fastest sparse one is than the fastest dense one and than the fastest dense one of int8. Dense layers do not mind
the sparsity; they are measured in every line, beside what they are compared with. Results of offpath are compared with
float64 before any time is reported: where activations are rounded to int8, within that rounding.

sparse fp32, bf16: SparseLinear. int8 fp32, bf16: Int8SparseLinear with activations as they are. int8 int8: the same
with activations="int8", float32 in and out. dense fp32, bf16: nn.Linear. dynamic: torch.ao's dynamically quantised
nn.Linear, float32 in and out. packed: torch._weight_int8pack_mm, int8 weights and bfloat16 activations.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from measure import WrongResult, at_least_one, check_product, interleaved, machine_line, print_and_write
from offpath.nn import Int8SparseLinear, SparseLinear

SHAPES = ((1024, 1024), (768, 3072), (4096, 4096))  # inputs, outputs
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
BATCHES = (1, 16, 256)
SPARSE = ("sparse fp32", "sparse bf16", "int8 fp32", "int8 bf16", "int8 int8")
DENSE = ("dense fp32", "dense bf16", "dynamic", "packed")


def table(inputs: int, outputs: int, batch: int, rounds: int) -> Iterator[str]:
    yield f"{inputs} -> {outputs}, batch {batch}: us; fastest sparse over fastest dense, and over fastest dense int8"
    yield f"{'':<9}" + "".join(f"{name:>12}" for name in (*SPARSE, *DENSE))
    for sparsity in SPARSITIES:
        sparse = SparseLinear(inputs, outputs, sparsity=sparsity)
        x = torch.randn(batch, inputs)
        with torch.inference_mode():
            calls = _calls(sparse, x)
            timings = {name: t.median_seconds for name, t in interleaved(calls, rounds).items()}
        times = "".join(f"{timings[name] * 1e6:12.1f}" for name in (*SPARSE, *DENSE))
        ours = min(timings[name] for name in SPARSE)
        of_dense = min(timings[name] for name in DENSE) / ours
        of_int8 = min(timings[name] for name in ("dynamic", "packed")) / ours
        yield f"{sparsity:<9.0%}{times}{of_dense:8.2f}{of_int8:8.2f}"


def _calls(sparse: SparseLinear, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    dense, small = sparse.to_dense(), x.bfloat16()
    sparse_bf16 = SparseLinear.from_dense(dense, sparse.pattern).bfloat16()
    dense_bf16 = sparse.to_dense().bfloat16()
    int8 = Int8SparseLinear.from_sparse(sparse)
    rounding = Int8SparseLinear.from_sparse(sparse, activations="int8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces that it moves to torchao
        dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(dense), {nn.Linear}, torch.qint8)
    levels = int8.pattern.to_dense(int8.values.float()).to(torch.int8)
    scales, bias = int8.scales.bfloat16(), dense_bf16.bias

    def packed() -> Tensor:
        return torch._weight_int8pack_mm(small, levels, scales) + bias

    _check(int8, x, int8(x))
    _check(int8, small, int8(small))
    _check(sparse, x, sparse(x))
    _check(sparse_bf16, small, sparse_bf16(small))
    _check_rounding(int8, x, rounding(x))
    return {
        "sparse fp32": partial(sparse, x),
        "sparse bf16": partial(sparse_bf16, small),
        "int8 fp32": partial(int8, x),
        "int8 bf16": partial(int8, small),
        "int8 int8": partial(rounding, x),
        "dense fp32": partial(dense, x),
        "dense bf16": partial(dense_bf16, small),
        "dynamic": partial(dynamic, x),
        "packed": packed,
    }


def _exact(layer: SparseLinear | Int8SparseLinear, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sparse = layer.to_sparse(torch.float64) if isinstance(layer, Int8SparseLinear) else layer
    weight, bias, x64 = sparse.to_dense().weight.double(), layer.bias.to(x.dtype).double(), x.double()
    size = nn.functional.linear(x64.abs(), weight.abs(), bias.abs())
    return nn.functional.linear(x64, weight, bias), size, weight


def _check(layer: SparseLinear | Int8SparseLinear, x: Tensor, y: Tensor) -> None:
    exact, size, weight = _exact(layer, x)
    terms = (weight != 0).sum(1) + 3
    # In bfloat16 the sum and its product with the scale may have been rounded to it, and not only y.
    rounded = 2.1 * size if x.dtype is torch.bfloat16 else None
    check_product(type(layer).__name__, y, exact, size, terms, rounded)


def _check_rounding(layer: Int8SparseLinear, x: Tensor, y: Tensor) -> None:
    """Each activation is off by at most half a level of its token, and a little for float32."""
    exact, _, weight = _exact(layer, x)
    level = x.double().abs().amax(1, keepdim=True) / 127
    bound = 0.5001 * level * weight.abs().sum(1) + 1e-6 * exact.abs()
    if bool(((y.double() - exact).abs() > bound).any()):
        raise WrongResult('Int8SparseLinear with activations="int8" is further off than half a level of each token')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/int8.txt"), help="default: %(default)s")
    parser.add_argument("--rounds", type=at_least_one, default=9, help="rounds of each line (default: %(default)s)")
    options = parser.parse_args()
    tables = (table(*shape, batch, options.rounds) for shape in SHAPES for batch in BATCHES)
    print_and_write(chain([machine_line()], chain.from_iterable(tables)), options.out)


if __name__ == "__main__":
    main()
