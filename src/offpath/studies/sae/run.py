"""One training run of an autoencoder: model, optimizer, data order and progress, advanced step by step."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from offpath.nn import SparseAutoencoder
from offpath.studies.config import RunError
from offpath.studies.ranks import ALONE, Ranks
from offpath.studies.resumable import check_finite
from offpath.studies.sae.activations import Activations
from offpath.studies.sae.config import MODELS, SaeConfig
from offpath.studies.sae.dense import DenseAutoencoder

EVALUATION_BATCH = 1024
# log10 of how often a latent fires, and into how many bins it is counted.
FREQUENCY_DECADES, FREQUENCY_BINS = (-5.0, 0.0), 25
# Pre-activations have about the spread of the samples, which is 1.
JUMPRELU_BANDWIDTH = 1.0


@dataclass
class Meter:
    """What the current epoch has summed up so far: `fvu_sum` and `l0_sum` over steps, weighted by their samples."""

    fvu_sum: float = 0.0
    l0_sum: float = 0.0
    samples: int = 0
    dead: int = 0
    step_seconds: list[float] = field(default_factory=list)


class SaeRun:
    """A run that can be stopped after any step and taken up again to the same numbers.

    The order of the samples follows from the seed and the epoch alone. A latent counts as dead when it has not fired
    for as many samples as an epoch has.
    """

    topology = None
    ranks: Ranks = ALONE

    def __init__(self, config: SaeConfig, data: Activations) -> None:
        self.config = config
        self.data = data
        if len(data.train) < config.batch_size:
            raise RunError(f"expected at least a batch of samples, got {len(data.train)}; lower --batch-size")
        # What does not fill a batch is left out: the next epoch has another order.
        self.steps_per_epoch = len(data.train) // config.batch_size
        generator = torch.Generator().manual_seed(config.seed)
        kind = DenseAutoencoder if config.dense else SparseAutoencoder
        self.model = kind(
            data.train.shape[1],
            config.latents,
            config.k,
            MODELS[config.model],
            dead_after=self.steps_per_epoch * config.batch_size,
            bandwidth=JUMPRELU_BANDWIDTH,
            generator=generator,
        )
        self.model.decoder_bias.data.copy_(data.mean)
        if self.model.activation != "topk":
            try:
                self.model.calibrate_threshold_(data.train[: config.batch_size])
            except ValueError as error:
                raise RunError(f"{error}; lower --k or raise --latents") from error
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate, fused=True)
        self.rng_state = generator.get_state()  # nothing is drawn while it trains
        self.step = 0
        self.meter = Meter()
        self._order: tuple[int, Tensor] | None = None

    @property
    def total_steps(self) -> int:
        """Steps from the start to the end of the last epoch."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def samples_per_step(self) -> float:
        """Samples of a step."""
        return self.config.batch_size

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.steps_per_epoch

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last step was the last of an epoch."""
        return self.step > 0 and self.step % self.steps_per_epoch == 0

    def advance(self, steps: int = 1) -> None:
        """Train for `steps` steps, at most to the end of the epoch. Raises `RunError` when the loss is not finite."""
        self.model.train()
        for _ in range(min(steps, self.steps_per_epoch - self.step % self.steps_per_epoch)):
            self._train_step()

    def _train_step(self) -> None:
        x = self.data.train[self._batch()]
        start = time.perf_counter()
        loss = self.model.loss(x)
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        self.model.project_decoder_gradient_()
        self.optimizer.step()
        self.model.normalize_decoder_()
        seconds = time.perf_counter() - start
        check_finite(float(loss.total.detach()), self.step + 1)
        self.meter.fvu_sum += float(loss.fvu.detach()) * len(x)
        self.meter.l0_sum += float(loss.l0) * len(x)
        self.meter.samples += len(x)
        self.meter.dead = loss.dead
        self.meter.step_seconds.append(seconds)
        self.step += 1

    def _batch(self) -> Tensor:
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self.data.train), generator=generator)
        return self._order[1][place * self.config.batch_size : (place + 1) * self.config.batch_size]

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """FVU and L0 on the test part as a whole, and how often each latent fires there, as a histogram of log10."""
        self.model.eval()
        error, fired, live = 0.0, torch.zeros(self.config.latents, dtype=torch.int64), 0
        for x in self.data.test.split(EVALUATION_BATCH):
            rows = self.model.encode(x)
            error += float((x - self.model.decode(rows)).double().square().sum())
            counts = rows.live_counts()
            fired += counts
            live += int(counts.sum())
        variance = float((self.data.test - self.data.test.mean(0)).double().square().sum())
        frequency = fired[fired > 0].double() / len(self.data.test)
        histogram = torch.histogram(frequency.log10().float(), bins=FREQUENCY_BINS, range=FREQUENCY_DECADES).hist
        return {
            "test_fvu": error / variance,
            "explained_variance": 1 - error / variance,
            "test_l0": live / len(self.data.test),
            "never_fired_in_test": int((fired == 0).sum()),
            "frequency_histogram": histogram.int().tolist(),
        }

    def finish_epoch(self) -> dict[str, Any]:
        """Evaluate, return the epoch's record, and start the sums of the next one.

        Raises `RunError` when the last step has spoilt the model: a checkpoint of it would go on to nothing.
        """
        evaluation = self.evaluate()
        check_finite(evaluation["test_fvu"], self.step)
        meter, self.meter = self.meter, Meter()
        train_seconds = sum(meter.step_seconds)
        return {
            "epoch": self.epoch,
            "step": self.step,
            "train_fvu": meter.fvu_sum / meter.samples,
            "train_l0": meter.l0_sum / meter.samples,
            "dead": meter.dead,
            **evaluation,
            "train_seconds": train_seconds,
            "tokens_per_second": meter.samples / train_seconds,
            "step_seconds": meter.step_seconds,
        }
