"""What a run has to have so that it can be stopped, written to a folder, taken up again and raced."""

from __future__ import annotations

import math
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from offpath.studies.config import RunError
from offpath.studies.ranks import Ranks
from offpath.topology import Topology


def check_finite(loss: float, step: int) -> None:
    """Raise `RunError` for a loss that training cannot come back from."""
    if not math.isfinite(loss):
        raise RunError(
            f"expected a finite loss, got {loss} at step {step}; start again with a smaller --learning-rate and "
            "another --out"
        )


class Checkpointed(Protocol):
    """What a checkpoint holds; `meter` is a dataclass of sums, `config` has `to_json` and `from_json`."""

    step: int
    meter: Any
    rng_state: Tensor

    @property
    def config(self) -> Any:
        """What the run was asked to do."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    @property
    def optimizer(self) -> Optimizer:
        """What trains it."""

    @property
    def topology(self) -> Topology | None:
        """What moves its connections."""

    @property
    def ranks(self) -> Ranks:
        """The processes that share its batches."""


class Resumable(Checkpointed, Protocol):
    """A run in epochs; `meter` is what the current one has summed up."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""

    @property
    def total_steps(self) -> int:
        """Steps from the start to the end of the last epoch."""

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last step was the last of an epoch."""

    def advance(self, steps: int = 1) -> None:
        """Train for `steps` steps, at most to the end of the epoch."""

    def finish_epoch(self) -> dict[str, Any]:
        """The record of the epoch that has ended."""
