"""One part of the run, in a process of its own: a crash, a hang or an illegal access ends this part alone.

Run by gpu/__main__.py: python -m gpu.part NAME FILE --seconds S --seed N [--quick] [--scale tiny|small|full]
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from gpu.check import INTERPRETED, Case, judge
from gpu.jobs import work_through
from gpu.sheet import Check, Sheet
from gpu.timing import QUICK, Deadline, Effort

# What a whole run consists of.
TIMED = ("topk", "autoencoder", "decode", "tiles", "expand", "live", "step", "layers")
PARTS = ("checks", "sanitizer", *TIMED)
# Groups of kernels that are checked side by side, each in a process: most of their time is compiling.
GROUPS = {
    "gathers": ("cases_rows", "gathers"),
    "sums by name": ("cases_rows", "by_name"),
    "selections": ("cases_selection", "cases"),
    "sparse weights": ("cases_weights", "cases"),
    "packed weights": ("cases_decode", "cases"),
    "tiled weights": ("cases_tiles", "cases"),
    "bucketed weights": ("cases_buckets", "cases"),
    "zero inputs": ("cases_decode", "live_cases"),
}
# Under a sanitizer it is not, and graphs cannot be captured.
CACHED_MEMORY = os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1"
CUDA_GROUPS = (
    "packed weights",
    "tiled weights",
    "bucketed weights",
    "zero inputs",
)  # which Triton's interpreter cannot run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", choices=("checks", *TIMED))
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="of checks; default: all")
    parser.add_argument("--scale", choices=("tiny", "small", "full"), default="full")
    options = parser.parse_args(arguments)
    deadline, sheet = Deadline.after(options.seconds), Sheet(options.file)
    torch.manual_seed(options.seed)
    device = torch.device("cpu" if INTERPRETED else "cuda")
    if options.name == "checks":
        check_all(options.groups, options.scale, device, sheet, deadline)
    else:
        jobs = importlib.import_module(f"gpu.{options.name}").jobs
        gc.freeze()  # each capture of a graph may collect garbage: not in what was imported
        work_through(jobs(options.quick, QUICK if options.quick else Effort(), device), sheet, deadline)
    sheet.save(finished=deadline.left_seconds > 0)


def check_all(groups: Sequence[str], scale: str, device: torch.device, sheet: Sheet, deadline: Deadline) -> None:
    """Judge every case there is time for. A group that cannot even be set up fails as a whole."""
    for group in groups:
        if device.type == "cpu" and group in CUDA_GROUPS:
            sheet.facts["not checked"] = "the CUDA kernels, which need a GPU"
            continue
        for check in _checks(group, scale, device):
            sheet.checks.append(check)
            sheet.save()
            if deadline.left_seconds <= 0:
                return
            if device.type == "cuda" and check.problems:
                torch.cuda.synchronize()  # raises when nothing else can run in this process


def _checks(group: str, scale: str, device: torch.device) -> Iterator[Check]:
    module, function = GROUPS[group]
    try:
        cases: Callable[[str, torch.device], Iterator[Case]] = getattr(
            importlib.import_module(f"gpu.{module}"), function
        )
        for case in cases(scale, device):
            yield judge(case, replayed=CACHED_MEMORY)
    except Exception as problem:  # whatever it is: it has to be in the report
        yield Check(group, "setting up the cases", None, (f"{type(problem).__name__}: {problem}",))


if __name__ == "__main__":
    main()
