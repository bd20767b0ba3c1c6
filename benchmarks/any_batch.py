"""Time against batch from 1 to 1024 for one layer, dense beside it: where sparse is slower, and the largest cliff.

Run with: .venv/bin/python benchmarks/any_batch.py [--inputs N] [--outputs N] [--sparsity S] [--step] [--out FILE.svg]
Takes about a minute. Medians of rounds that each go through all sizes, so that a slow spell makes no cliff. Each result
is checked against float64 before any time is taken. FILE gets the plot (svg, png or pdf), and FILE.json the medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from contenders import CONTENDERS, Contender
from measure import at_least_one, check_forward, check_step, dtype_name, interleaved, machine_line, training_step
from offpath.cost import this_machine
from offpath.kernels import KernelError
from offpath.studies.files import write_text, write_whole
from offpath.studies.plots import COLORS

DTYPES = (torch.float32, torch.bfloat16)
LINES = {"fp32": "-", "bf16": "--"}
# Every size up to 128, then those around each multiple of a vector of float32.
BATCHES = (*range(1, 129), *(b + d for b in range(144, 1025, 16) for d in (-1, 0, 1) if b + d <= 1024))
NEIGHBOURS = 8
VECTOR = 16  # float32 lanes of the widest vector: what a tail is rounded up to
ROUNDS, SAMPLE_SECONDS = 9, 0.002
INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C has ended


@dataclass(frozen=True)
class Cliff:
    """The largest step above the trend, from size number `place` to the next, and the costliest tail of a vector.

    Both as shares of what was to be expected; `typical_step`, the median without its sign, shows the noise.
    """

    place: int
    largest_step: float
    typical_step: float
    tail_batch: int
    tail_ratio: float

    def in_words(self, batches: Sequence[int]) -> str:
        return (
            f"largest step {self.largest_step:+.0%} above the trend, from {batches[self.place]} to "
            f"{batches[self.place + 1]} (typical: {self.typical_step:.0%}); costliest tail "
            f"{self.tail_ratio:.2f}x of the batch rounded up to {VECTOR}, at {self.tail_batch}"
        )


def excess_steps(batches: Sequence[int], seconds: Sequence[float]) -> np.ndarray:
    """How much each step to the next size is above the trend, as a share: 0.5 is a cliff of 50 %.

    The trend is a straight line in log(time) over log(batch) through the 8 sizes on either side of the step.
    """
    x, y = np.log(batches), np.log(seconds)
    excess = []
    for i in range(len(x) - 1):
        near = slice(max(0, i + 1 - NEIGHBOURS), i + 1 + NEIGHBOURS)
        slope = np.polyfit(x[near], y[near], 1)[0]
        excess.append(np.expm1(y[i + 1] - y[i] - slope * (x[i + 1] - x[i])))
    return np.array(excess)


def worst_tail(batches: Sequence[int], seconds: Sequence[float], vector: int) -> tuple[int, float]:
    """The size that costs most beside the next multiple of `vector`, and its time over that one's."""
    time_of = dict(zip(batches, seconds, strict=True))
    ratios = {b: time_of[b] / time_of[full] for b in batches if (full := -(-b // vector) * vector) in time_of}
    worst = max(ratios, key=lambda batch: ratios[batch])
    return worst, ratios[worst]


def beside_dense(batches: Sequence[int], dense: Sequence[float], sparse: Sequence[float]) -> str:
    """How many times as long dense takes, least and most, and at which sizes it takes less than 1."""
    ratios = dict(zip(batches, (d / s for d, s in zip(dense, sparse, strict=True)), strict=True))
    least, most = min(ratios, key=lambda b: ratios[b]), max(ratios, key=lambda b: ratios[b])
    slower = [
        [batch for batch, _ in group]
        for is_slower, group in itertools.groupby(ratios.items(), key=lambda item: item[1] < 1)
        if is_slower
    ]
    spans = ", ".join(f"{span[0]} to {span[-1]}" if len(span) > 1 else f"{span[0]}" for span in slower)
    return (
        f"dense takes {ratios[least]:.2f} ({least}) to {ratios[most]:.2f} ({most}) times as long as offpath; "
        f"less at {spans or 'no size'}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and draw. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--inputs", type=int, default=1024)
    parser.add_argument("--outputs", type=int, default=1024)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--step", action="store_true", help="the training step, not the forward product")
    parser.add_argument("--max-batch", type=at_least_one, default=BATCHES[-1])
    parser.add_argument("--rounds", type=at_least_one, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=Path("runs/any_batch.svg"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.max_batch < VECTOR:
        parser.error(f"expected --max-batch of at least {VECTOR}, a full vector, got {options.max_batch}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    batches = [batch for batch in BATCHES if batch <= options.max_batch]
    layer = f"{options.inputs} -> {options.outputs}, {options.sparsity:.0%}"
    what = f"{'training step' if options.step else 'forward'}, {layer}"

    print(f"{machine_line()}\n{what}, batch {batches[0]} to {batches[-1]}")
    try:
        lines = _median_seconds(batches, options)
    except KeyboardInterrupt:
        print("interrupted; nothing was written")
        return INTERRUPTED
    cliffs = {line: _cliff(batches, seconds) for line, seconds in lines.items()}
    for line, cliff in cliffs.items():
        print(f"{line:<13}{cliff.in_words(batches)}")
    for dtype in map(dtype_name, DTYPES):
        if {f"{dtype} dense", f"{dtype} offpath"} <= set(lines):
            print(f"{dtype:<13}{beside_dense(batches, lines[f'{dtype} dense'], lines[f'{dtype} offpath'])}")
    figure = _plot(what, batches, lines, cliffs)
    write_whole(options.out, partial(figure.savefig, format=options.out.suffix.removeprefix(".")))
    content = {
        "machine": asdict(this_machine()),
        "what": what,
        "batches": batches,
        "seconds": lines,
        "cliffs": {line: asdict(cliff) for line, cliff in cliffs.items()},
    }
    write_text(options.out.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    return 0


def _median_seconds(batches: Sequence[int], options: argparse.Namespace) -> dict[str, list[float]]:
    """A line of medians for each dtype and layer; what is refused is said, and left out."""
    calls: dict[tuple[str, int], Callable[[], object]] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for dtype, name in itertools.product(DTYPES, ("dense", "offpath")):
            line = f"{dtype_name(dtype)} {name}"
            sizes = progress.track(batches, description=f"checking {line}")
            try:
                contender = CONTENDERS[name](options.inputs, options.outputs, options.sparsity, dtype)
                checked = _checked_calls(contender, sizes, dtype, options)
            except KernelError as error:
                print(f"{line}: refused: {error}")
                continue
            calls |= {(line, batch): call for batch, call in checked.items()}
        # By size, then by line: what is compared stands close together in time.
        calls = {key: calls[key] for key in sorted(calls, key=lambda key: key[1])}
        task = progress.add_task("measuring", total=options.rounds)
        times = interleaved(calls, options.rounds, SAMPLE_SECONDS, after_round=lambda: progress.advance(task))
    lines = dict.fromkeys(line for line, _ in calls)
    return {line: [times[line, batch].median_seconds for batch in batches] for line in lines}


def _checked_calls(
    contender: Contender, batches: Iterable[int], dtype: torch.dtype, options: argparse.Namespace
) -> dict[int, Callable[[], object]]:
    torch.manual_seed(0)
    all_x, all_dy = (torch.randn(BATCHES[-1], size, dtype=dtype) for size in (options.inputs, options.outputs))

    def step(x: Tensor, dy: Tensor) -> None:
        # A leaf of its own in each call, or the gradients of hundreds of sizes would be kept at once.
        training_step(contender.layer, x.detach().requires_grad_(), dy)

    calls: dict[int, Callable[[], object]] = {}
    for batch in batches:
        x, dy = all_x[:batch], all_dy[:batch]
        if options.step:
            check_step(contender, x, dy)
            calls[batch] = partial(step, x, dy)
        else:
            check_forward(contender, x)
            calls[batch] = torch.no_grad()(partial(contender.layer, x))
    return calls


def _cliff(batches: Sequence[int], seconds: Sequence[float]) -> Cliff:
    steps = excess_steps(batches, seconds)
    tail_batch, tail_ratio = worst_tail(batches, seconds, VECTOR)
    place = int(steps.argmax())
    return Cliff(place, float(steps[place]), float(np.median(np.abs(steps))), tail_batch, tail_ratio)


def _plot(what: str, batches: Sequence[int], lines: dict[str, list[float]], cliffs: dict[str, Cliff]) -> Figure:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for line, seconds in lines.items():
        dtype, name = line.split()
        color = COLORS["dense" if name == "dense" else "sparse"]
        axes.plot(batches, np.array(seconds) * 1e3, LINES[dtype], color=color, label=line, linewidth=1.2)
        edge = slice(cliffs[line].place, cliffs[line].place + 2)
        axes.plot(batches[edge], np.array(seconds[edge]) * 1e3, "o", color=color, markersize=4)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="batch",
        ylabel="milliseconds",
        title=f"{what}; dots: the largest step\n{machine_line()}",
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


if __name__ == "__main__":
    sys.exit(main())
