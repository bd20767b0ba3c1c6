"""One training run: model, optimizer, data order and progress, advanced step by step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from offpath.studies.config import RunConfig, RunError
from offpath.studies.data import Dataset
from offpath.studies.methods import end_of_updates, make_topology, topology_record
from offpath.studies.models import build_model
from offpath.studies.ranks import ALONE, Ranks
from offpath.studies.resumable import check_finite
from offpath.topology import TopologyError

EVALUATION_BATCH = 1024


@dataclass
class Meter:
    """What the current epoch has summed up so far."""

    loss_sum: float = 0.0
    correct: int = 0
    samples: int = 0
    updates: int = 0
    dropped: int = 0
    grown: int = 0
    step_seconds: list[float] = field(default_factory=list)


class Run:
    """A training run that can be stopped after any step and taken up again to the same numbers.

    Whatever is random draws from the run's own generator states, so two runs in one process do not disturb each
    other, and the order of the data follows from the seed and the epoch alone. `config` is what was asked for with
    nothing left open: it says at which step the last connections move.

    In many processes, `config.batch_size` samples are shared out among them in every step: however many there are, the
    steps are the same but for rounding.
    """

    def __init__(self, config: RunConfig, dataset: Dataset, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.samples = len(dataset.train_labels)
        self.steps_per_epoch = math.ceil(self.samples / config.batch_size)
        if config.moves and config.end_step is None:
            config = replace(config, end_step=end_of_updates(config.epochs * self.steps_per_epoch))
        self.config = config
        self.device = ranks.device(config.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = build_model(
                config.model,
                dataset.features,
                dataset.classes,
                config.sparsity,
                config.distribution,
                config.seed,
                all_connections=config.method == "gmp",
            )
            self.rng_state = torch.get_rng_state()
        self.model: nn.Module = model.to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate, fused=True)
        self._network = self.model if ranks.count == 1 else ranks.wrap(self.model)
        self.topology = make_topology(config, self._network, self.optimizer)
        self.train_images, self.train_labels, self.test_images, self.test_labels = (
            t.to(self.device)
            for t in (dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels)
        )
        self.step = 0
        self.meter = Meter()
        self._order: tuple[int, Tensor] | None = None

    @property
    def total_steps(self) -> int:
        """Steps from the start to the end of the last epoch."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def samples_per_step(self) -> float:
        """Samples of a step on average; the last step of an epoch may hold fewer than a batch."""
        return self.samples / self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.steps_per_epoch

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last step was the last of an epoch."""
        return self.step > 0 and self.step % self.steps_per_epoch == 0

    def advance(self, steps: int = 1) -> None:
        """Train for `steps` steps, at most to the end of the epoch.

        Raises `RunError` when the loss is not finite or the connections cannot be moved; the numbers up to the last
        checkpoint are still good.
        """
        self.model.train()
        steps = min(steps, self.steps_per_epoch - self.step % self.steps_per_epoch)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.rng_state)
            for _ in range(steps):
                self._train_step()
            self.rng_state = torch.get_rng_state()

    def _train_step(self) -> None:
        batch = self._batch()
        start = time.perf_counter()
        mine = self.ranks.share(batch)
        images, labels = self.train_images[mine], self.train_labels[mine]
        logits = self._network(images)
        loss = functional.cross_entropy(logits, labels) if len(mine) else logits.sum()
        self.optimizer.zero_grad(set_to_none=True)
        # Gradients are averaged over processes: with this factor, they are those of the mean over the whole batch.
        (loss if self.ranks.count == 1 else loss * (self.ranks.count * len(mine) / len(batch))).backward()
        self.optimizer.step()
        (loss_sum,) = self.ranks.sum(float(loss.detach()) * len(mine))
        check_finite(loss_sum / len(batch), self.step + 1)
        self._move_connections()
        self._wait()
        seconds = time.perf_counter() - start
        (correct,) = self.ranks.sum(int((logits.detach().argmax(1) == labels).sum()))
        self.meter.loss_sum += loss_sum
        self.meter.correct += int(correct)
        self.meter.samples += len(batch)
        self.meter.step_seconds.append(seconds)
        self.step += 1

    def _move_connections(self) -> None:
        try:
            update = self.topology.step() if self.topology else None
        except TopologyError as error:
            raise RunError(f"{error}; this was at step {self.step + 1} of {self.config.method}") from error
        if update is not None:
            self.meter.updates += 1
            self.meter.dropped += update.dropped
            self.meter.grown += update.grown

    def _batch(self) -> Tensor:
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(self.samples, generator=generator).to(self.device)
        return self._order[1][place * self.config.batch_size : (place + 1) * self.config.batch_size]

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy on the test set."""
        self.model.eval()
        loss_sum, correct = 0.0, 0
        batches = zip(self.test_images.split(EVALUATION_BATCH), self.test_labels.split(EVALUATION_BATCH), strict=True)
        for images, labels in list(batches)[self.ranks.rank :: self.ranks.count]:
            logits = self.model(images)
            loss_sum += float(functional.cross_entropy(logits, labels, reduction="sum"))
            correct += int((logits.argmax(1) == labels).sum())
        loss_sum, hits = self.ranks.sum(loss_sum, correct)
        return loss_sum / len(self.test_labels), hits / len(self.test_labels)

    def finish_epoch(self) -> dict[str, Any]:
        """Evaluate, return the epoch's record, and start the sums of the next one.

        Raises `RunError` when the last step has spoilt the model: a checkpoint of it would go on to nothing.
        """
        test_loss, test_accuracy = self.evaluate()
        check_finite(test_loss, self.step)
        meter, self.meter = self.meter, Meter()
        train_seconds = sum(meter.step_seconds)
        moved = {"updates": meter.updates, "dropped": meter.dropped, "grown": meter.grown}
        topology = {"topology": moved | topology_record(self.topology)} if self.topology else {}
        return {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": meter.loss_sum / meter.samples,
            "train_accuracy": meter.correct / meter.samples,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "train_seconds": train_seconds,
            "samples_per_second": meter.samples / train_seconds,
            "processes": self.ranks.count,
            **topology,
            "step_seconds": meter.step_seconds,
        }

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
