"""`offpath train` in many processes."""

from __future__ import annotations

import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offpath.studies import RunConfig, RunError, train
from offpath.studies.data import load
from offpath.studies.ranks import Ranks
from offpath.studies.run import Run
from ranks import check, count, gathered, my_rank
from test_train_methods import SMALL, Stopper, numbers


def _config(method: str) -> RunConfig:
    # 65 samples do not divide by 2 or 4, and the last batch of an epoch of 1437 has 7. 23 steps an epoch.
    return replace(SMALL, method=method, batch_size=65, epochs=2 if method == "rigl" else 1, update_freq=5)


class _StopsOneRank(Stopper):
    """Ctrl-C that reaches the last process alone."""

    def on_step(self, run: Any) -> None:
        self.steps += 1
        if self.steps == self.after_steps and my_rank() == count() - 1:
            signal.raise_signal(signal.SIGINT)


def _run_stops_and_goes_on(method: str) -> None:
    ranks, config, folder = Ranks(my_rank(), count()), _config(method), Path(sys.argv[1])
    whole, halves = folder / f"{method}-whole-{count()}", folder / f"{method}-parts-{count()}"
    assert train(config, whole, Stopper(), ranks=ranks)
    assert not train(config, halves, _StopsOneRank(12), ranks=ranks)
    assert train(config, halves, Stopper(), resume=True, ranks=ranks)
    assert numbers(halves, ranks) == numbers(whole, ranks)


def _run_that_exists_is_refused() -> None:
    """By the first process, with a message; the others end quietly."""
    kind = None
    try:
        train(_config("rigl"), Path(sys.argv[1]) / f"rigl-whole-{count()}", Stopper(), ranks=Ranks(my_rank(), count()))
    except (RunError, SystemExit) as error:
        kind = type(error).__name__
    assert gathered(kind) == ["RunError"] + ["SystemExit"] * (count() - 1)


def _run_shares_out_a_batch() -> None:
    """The last batch of an epoch, 7 samples, in float64: loss, hits and gradients are those of one process."""
    dataset = load("digits")
    dataset = replace(dataset, **{n: getattr(dataset, n).double() for n in ("train_images", "test_images")})
    torch.set_default_dtype(torch.float64)
    # All processes train the one that is alone, each for itself: the mean of equal gradients is the gradient.
    runs = [Run(_config("rigl"), dataset, ranks) for ranks in (Ranks(), Ranks(my_rank(), count()))]
    torch.set_default_dtype(torch.float32)
    for run in runs:
        run.step = run.steps_per_epoch - 1
        run.advance()
    alone, shared = runs
    assert shared.meter.samples == alone.meter.samples == 7 and shared.meter.correct == alone.meter.correct
    torch.testing.assert_close(shared.meter.loss_sum, alone.meter.loss_sum)
    for a, b in zip(alone.model.parameters(), shared.model.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad)
    torch.testing.assert_close(shared.evaluate(), alone.evaluate())


def _run_averages_in_its_own_thread() -> None:
    """In a thread of gloo's, a process is aborted whose interpreter ends meanwhile, as after another one's death."""
    model = Ranks(my_rank(), count()).wrap(nn.Linear(3, 2))
    threads, copy = set(), torch._foreach_copy_
    torch._foreach_copy_ = lambda *parts: (threads.add(threading.get_ident()), copy(*parts))
    try:
        for _ in range(3):
            model(torch.ones(1, 3)).sum().backward()
    finally:
        torch._foreach_copy_ = copy
    assert threads == {threading.get_ident()}


for name in ("rigl", "gmp"):
    check(_run_stops_and_goes_on, name)
check(_run_that_exists_is_refused)
check(_run_shares_out_a_batch)
check(_run_averages_in_its_own_thread)
