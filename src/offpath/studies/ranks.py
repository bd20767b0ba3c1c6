"""The processes that `torchrun` started for one run, and how they keep together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from offpath.studies.config import RunError

Made = TypeVar("Made")
# A process that dies closes its connections and is missed at once; one that hangs, after this long. Every wait of a
# healthy run is shorter: evaluations, checkpoints, and the measuring of the kernels on a machine that is new.
TIMEOUT_SECONDS = 300
ONE_BUCKET_MB = 2**20


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run; alone, none of this communicates."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device that a config calls `name`: of many processes on a machine, each has a GPU of its own."""
        if name == "cuda" and self.count > 1:
            return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        return torch.device(name)

    def wrap(self, model: nn.Module) -> DistributedDataParallel:
        """`model` with gradients that are averaged over the processes, to the same bits in every step."""
        wrapped = DistributedDataParallel(model, bucket_cap_mb=ONE_BUCKET_MB)
        wrapped.register_comm_hook(list(model.parameters()), _average_in_order)
        return wrapped

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of a batch: the parts differ by at most one sample, and some may be empty."""
        return batch.tensor_split(self.count)[self.rank]

    def sum(self, *numbers: float) -> list[float]:
        """Each of the numbers summed over all processes, in float64."""
        if self.count == 1:
            return list(numbers)
        together = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(together)
        return together.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process; returns in none before all have come here."""
        return self.sum(flag)[0] > 0

    def from_first(self, make: Callable[[], Made]) -> Made:
        """What `make` returns in the first process, in all of them; where it raises there, the others end quietly."""
        if self.count == 1:
            return make()
        message: list = [None, False]
        try:
            if self.first:
                message = [make(), True]
        finally:
            distributed.broadcast_object_list(message)
        if not message[1]:
            raise SystemExit(1)  # the first process has said why
        return message[0]


ALONE = Ranks()


def expect_one_process(what: str) -> None:
    """Raise `RunError` where torchrun has started several processes, which would all do the same."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1" and distributed.is_available() and distributed.is_torchelastic_launched():
        raise RunError(f"expected one process for {what}, got {count} of torchrun; start it without")


@contextmanager
def ranks_of_torchrun() -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone when it was not started by torchrun.

    Raises `RunError` in place of what the block raises where another process has died or does not answer.
    """
    if not (distributed.is_available() and distributed.is_torchelastic_launched()):
        yield ALONE
        return
    distributed.init_process_group(timeout=timedelta(seconds=TIMEOUT_SECONDS))
    ranks = Ranks(distributed.get_rank(), distributed.get_world_size())
    try:
        yield ranks
    except RuntimeError as error:
        if not _is_about_a_peer(error):
            raise
        raise RunError(
            f"expected all {ranks.count} processes of the run to answer, but one has ended or hangs ({error}); its own "
            "message says more. Start again with --resume: the run is saved up to its last epoch"
        ) from error
    finally:
        distributed.destroy_process_group()


def _average_in_order(parameters, bucket):  # no annotations: torch compares them with classes, here they are strings
    """Average the gradients as one vector, in the order of `parameters`.

    Where a gradient lies in the vector says in which order those of three or more processes are added. Torch lays its
    buckets out anew after the first step, so that a resumed run would round otherwise.
    """
    gradients = {id(p): g for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)}
    ordered = [gradients[id(p)] for p in parameters]
    together = torch.cat([gradient.flatten() for gradient in ordered]).div_(distributed.get_world_size())
    # Waited for here, as there is no other bucket to go on with. What is told to run afterwards runs in a thread of
    # gloo's, which aborts this process where it still holds something of Python's when an interpreter ends.
    distributed.all_reduce(together)
    parts = together.split([gradient.numel() for gradient in ordered])
    torch._foreach_copy_(ordered, [part.view_as(gradient) for part, gradient in zip(parts, ordered, strict=True)])
    done: torch.futures.Future = torch.futures.Future(devices=[together.device] if together.is_cuda else [])
    done.set_result(bucket.buffer())
    return done


def _is_about_a_peer(error: RuntimeError) -> bool:
    # gloo raises plain RuntimeErrors, which name its source files.
    return isinstance(error, distributed.DistError) or "gloo" in str(error)
