"""One training run of the study, from the first step to its record."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim import Optimizer

from offpath.cost import model_bytes, training_bytes
from offpath.studies.config import RunError
from offpath.studies.methods import end_of_updates, topology_record
from offpath.studies.topology.config import GMP_, MEAN_METHODS, RIGL, SET_, SET_MEAN, Arm, TaskConfig, Trial
from offpath.studies.topology.task import Task, parameter_count
from offpath.topology import GMP, SET, RigL, Topology

WARM_UP_SHARE = 0.05
Progress = Callable[[int, int], None]


class Training:
    """A model, its optimizer and its topology, advanced step by step."""

    def __init__(self, task: Task, arm: Arm, seed: int, steps: int, learning_rate: float, tuning: bool = False) -> None:
        self.task, self.arm, self.seed, self.steps, self.tuning = task, arm, seed, steps, tuning
        self.learning_rate = learning_rate
        torch.manual_seed(seed)
        self.model: nn.Module = task.model(arm, seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=learning_rate, fused=True)
        self.topology = _topology(task.config, arm, self.model, self.optimizer, steps, seed)
        self.step = self.updates = self.dropped = self.grown = 0

    def advance(self) -> float:
        """Train for one step and return its loss. Raises `RunError` when it is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * schedule(self.step, self.steps)
        inputs, classes = self.task.batch(self.seed, self.step, self.tuning)
        loss = functional.cross_entropy(self.model(inputs), classes)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        update = self.topology.step() if self.topology else None
        if update is not None:
            self.updates += 1
            self.dropped += update.dropped
            self.grown += update.grown
        self.step += 1
        return float(loss.detach())


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate at a step: rises over the first 5 % of the steps, then falls to zero as a cosine.

    >>> [round(schedule(step, 1000), 3) for step in (0, 49, 500, 999)]
    [0.02, 0.994, 0.5, 0.0]
    """
    rising = min(1.0, (step + 1) / max(1, round(WARM_UP_SHARE * steps)))
    return rising * 0.5 * (1 + math.cos(math.pi * step / steps))


def run_trial(task: Task, trial: Trial, learning_rate: float, progress: Progress) -> dict[str, Any]:
    """Train one trial to its end and return its record; `progress` is told the steps done and all of them.

    A loss that is not finite ends a trial that tunes: that learning rate has lost. Otherwise raises `RunError`.
    """
    config, tuning = task.config, trial.tuning_rate is not None
    steps = config.tuning_steps if tuning else config.steps
    training = Training(task, trial.arm, trial.seed, steps, learning_rate, tuning)
    curve: list[dict[str, Any]] = []
    loss_sum, since = 0.0, 0
    while training.step < steps:
        loss = training.advance()
        if not math.isfinite(loss):
            if tuning:
                return _record(training, [{"step": training.step, "loss": None, "accuracy": None}])
            raise RunError(f"expected a finite loss, got {loss} at step {training.step} of {trial.name}")
        loss_sum, since = loss_sum + loss, since + 1
        if training.step == steps or (training.step % config.evaluate_every == 0 and not tuning):
            training.model.eval()
            score = task.score(training.model, tuning)
            training.model.train()
            curve.append({"step": training.step, "train_loss": loss_sum / since} | asdict(score))
            loss_sum, since = 0.0, 0
        progress(training.step, steps)
    return _record(training, curve)


def _record(training: Training, curve: list[dict[str, Any]]) -> dict[str, Any]:
    moved: dict[str, Any] = {}
    if training.topology:
        moved = {"updates": training.updates, "dropped": training.dropped, "grown": training.grown}
        moved |= topology_record(training.topology)
    return {
        "learning_rate": training.learning_rate,
        "parameters": parameter_count(training.model),
        "stored_bytes": model_bytes(training.model),
        "training_bytes": training_bytes(training.model, training.optimizer).total,
        "topology": moved,
        "curve": curve,
    }


def _topology(
    config: TaskConfig, arm: Arm, model: nn.Module, optimizer: Optimizer, steps: int, seed: int
) -> Topology | None:
    common: dict[str, Any] = {"update_freq": config.update_freq, "end_step": end_of_updates(steps), "seed": seed}
    if arm.method == GMP_:
        return GMP(model, optimizer, final_sparsity=arm.sparsity, **common)
    if arm.method in (SET_, RIGL, *MEAN_METHODS):
        recipe = SET if arm.method in (SET_, SET_MEAN) else RigL
        if arm.method in MEAN_METHODS:
            common["grown_state"] = {"exp_avg_sq": "mean"}
        return recipe(model, optimizer, drop_fraction=config.drop_fraction, schedule="cosine", **common)
    return None
