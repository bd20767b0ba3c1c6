"""torch's own transformer encoder with sparse feed-forward layers beside the dense one: training steps and inference.

Run with: .venv/bin/python benchmarks/encoders.py [--out FILE] [--rounds N]
Takes over two minutes. Two layers of `nn.TransformerEncoder`, whose attention stays dense. In inference, torch
computes the dense ones in one fused call each, and, of a padded batch, only what is not padding (a quarter is); the
sparse ones are called. A ratio above 1 says how many times faster the sparse one is; "differ" compares its output with
that of the same weights with their zeros written out.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, product
from pathlib import Path

import torch
from torch import Tensor, nn

import offpath
from measure import at_least_one, dtype_name, interleaved, machine_line, print_and_write, speedup

SIZES = ((256, 8, 32), (256, 8, 128), (512, 1, 16), (512, 8, 64))  # width, sequences, tokens of each
SPARSITIES = (0.5, 0.8, 0.9)
DTYPES = (torch.float32, torch.bfloat16)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def _inference(model: nn.Module, x: Tensor, padding: Tensor | None) -> Tensor:
    with torch.no_grad():
        return model(x, src_key_padding_mask=padding)


def _pair(width: int, sparsity: float, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
    dense = nn.TransformerEncoder(layer, 2).to(dtype)
    sparse = copy.deepcopy(dense)
    offpath.sparsify(sparse, sparsity, seed=0)
    return dense, sparse


def _measure(size: tuple[int, int, int], sparsity: float, dtype: torch.dtype, rounds: int) -> str:
    width, sequences, tokens = size
    dense, sparse = _pair(width, sparsity, dtype)
    x = torch.randn(sequences, tokens, width, dtype=dtype)
    lengths = torch.linspace(tokens // 2, tokens, sequences).long()  # three quarters on average
    padding = torch.arange(tokens) >= lengths[:, None]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4) for model in (dense, sparse)]
    steps = [partial(_step, model, optimizer, x) for model, optimizer in zip((dense, sparse), optimizers, strict=True)]
    ratios = {"step": _ratio(*steps, rounds)}
    for model in (dense, sparse):
        model.eval()
    for what, mask in (("inference", None), ("padded", padding)):
        ratios[what] = _ratio(*(partial(_inference, model, x, mask) for model in (dense, sparse)), rounds)
    twin = copy.deepcopy(sparse)
    offpath.densify(twin)
    found, right = (_inference(model, x, None).double() for model in (sparse, twin))
    values = "   ".join(f"{what} {ratio:4.2f}" for what, ratio in ratios.items())
    difference = float((found - right).norm() / right.norm())
    return (
        f"{dtype_name(dtype)}  {width} wide, {sequences} x {tokens} tokens, {sparsity:.0%}:   {values}   "
        f"differ by {difference:.0e}"
    )


def _ratio(dense: Callable[[], object], sparse: Callable[[], object], rounds: int) -> float:
    timings = interleaved({"dense": dense, "sparse": sparse}, rounds, sample_seconds=0.02)
    return speedup(timings["dense"], timings["sparse"]).ratio


def _lines(rounds: int) -> Iterator[str]:
    for dtype, size, sparsity in product(DTYPES, SIZES, SPARSITIES):
        yield _measure(size, sparsity, dtype, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/encoders.txt"), help="default: %(default)s")
    parser.add_argument("--rounds", type=at_least_one, default=21, help="of each ratio (default: %(default)s)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
    print_and_write(chain([machine_line()], _lines(options.rounds)), options.out)


if __name__ == "__main__":
    main()
