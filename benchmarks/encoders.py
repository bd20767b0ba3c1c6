"""torch's own transformer encoder with sparse layers beside the dense one: training steps and inference.

Run with: .venv/bin/python benchmarks/encoders.py [--out FILE] [--rounds N]
Takes two minutes. Two layers of `nn.TransformerEncoder`, of which the feed-forward layers are sparse, or all, with the
attention unpacked. In inference, torch computes the dense ones in one fused call each, and, of a padded batch, only
what is not padding (a quarter is); the sparse ones are called. A ratio above 1 says how many times faster the sparse
one is; "differ" compares the output where all are sparse with that of the same weights with their zeros written out.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
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
SPARSE = ("feed-forward", "all")


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def _inference(model: nn.Module, x: Tensor, padding: Tensor | None) -> Tensor:
    with torch.no_grad():
        return model(x, src_key_padding_mask=padding)


def _models(width: int, sparsity: float, dtype: torch.dtype) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
    dense = nn.TransformerEncoder(layer, 2).to(dtype)
    models = {"dense": dense, **{which: copy.deepcopy(dense) for which in SPARSE}}
    offpath.unpack_attention(models["all"])
    for which in SPARSE:
        offpath.sparsify(models[which], sparsity, seed=0)
    return models


def _measure(size: tuple[int, int, int], sparsity: float, dtype: torch.dtype, rounds: int) -> str:
    width, sequences, tokens = size
    models = _models(width, sparsity, dtype)
    x = torch.randn(sequences, tokens, width, dtype=dtype)
    lengths = torch.linspace(tokens // 2, tokens, sequences).long()  # three quarters on average
    padding = torch.arange(tokens) >= lengths[:, None]
    steps = {
        which: partial(_step, model, torch.optim.AdamW(model.parameters(), lr=1e-4), x)
        for which, model in models.items()
    }
    values = [f"step {_ratios(steps, rounds)}"]
    for model in models.values():
        model.eval()
    for what, mask in (("inference", None), ("padded", padding)):
        calls = {which: partial(_inference, model, x, mask) for which, model in models.items()}
        values.append(f"{what} {_ratios(calls, rounds)}")
    twin = copy.deepcopy(models["all"])
    offpath.densify(twin)
    found, right = (_inference(model, x, None).double() for model in (models["all"], twin))
    values.append(f"differ by {float((found - right).norm() / right.norm()):.0e}")
    return (
        f"{dtype_name(dtype)}  {width} wide, {sequences} x {tokens:3d} tokens, {sparsity:.0%}:   {'   '.join(values)}"
    )


def _ratios(calls: Mapping[str, Callable[[], object]], rounds: int) -> str:
    timings = interleaved(calls, rounds, sample_seconds=0.02)
    return " / ".join(f"{speedup(timings['dense'], timings[which]).ratio:4.2f}" for which in SPARSE)


def _lines(rounds: int) -> Iterator[str]:
    yield f"times as fast as dense, sparse: {' / '.join(SPARSE)}"
    for dtype, size, sparsity in product(DTYPES, SIZES, SPARSITIES):
        yield _measure(size, sparsity, dtype, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/encoders.txt"), help="default: %(default)s")
    parser.add_argument("--rounds", type=at_least_one, default=11, help="of each ratio (default: %(default)s)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
    print_and_write(chain([machine_line()], _lines(options.rounds)), options.out)


if __name__ == "__main__":
    main()
