"""A short training under `GMP`: fewer and fewer connections, and still the embeddings of the dense model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn

from offpath.studies.compression.config import StudyConfig
from offpath.studies.compression.pretrained import Pretrained
from offpath.studies.compression.quality import mean_embedding
from offpath.studies.compression.texts import shuffled_batches
from offpath.studies.compression.tokens import padded
from offpath.studies.ranks import ALONE, Ranks
from offpath.topology import GMP, Topology

WARM_UP_SHARE = 0.05
# The rest of the steps is for the weights that are left.
PRUNING_SHARE = 0.6


@dataclass
class Meter:
    """Sums since the start: of the loss of each step."""

    loss_sum: float = 0.0
    steps: int = 0


class Distillation:
    """A model of sparse layers, trained towards `targets` [texts, features], the dense model's embeddings of `ids`.

    The loss is 1 - cosine, averaged over the texts of a batch. It has what a run needs to be stopped and gone on with.
    """

    def __init__(
        self, config: StudyConfig, stage: int, student: Pretrained, ids: list[list[int]], targets: Tensor
    ) -> None:
        # The config of a checkpoint says which stage it is of.
        self.config = replace(config, sparsities=(config.sparsities[stage],), steps=(config.steps[stage],))
        self.student, self.ids, self.targets = student, ids, targets
        self.model: nn.Module = student.model.eval()  # no dropout: the targets were made without
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(is_trained(name))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0, fused=True)
        self.total_steps = config.steps[stage]
        end_step = max(config.update_freq, int(PRUNING_SHARE * self.total_steps))
        self.topology: Topology = GMP(
            self.model,
            self.optimizer,
            final_sparsity=config.sparsities[stage],
            end_step=end_step,
            update_freq=config.update_freq,
            record_explored=True,  # what a checkpoint holds
        )
        self.step, self.meter = 0, Meter()
        self.ranks: Ranks = ALONE
        self.rng_state = torch.Generator().manual_seed(config.seed).get_state()  # nothing is drawn while it trains
        self._batches: Iterator[list[int]] = iter(())
        self._batches_at = -1

    def advance(self, steps: int = 1) -> None:
        """Train for `steps` steps, at most to the end."""
        for _ in range(min(steps, self.total_steps - self.step)):
            places = self._next_batch()
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate * self._schedule()
            inputs = padded(self.student, [self.ids[place] for place in places])
            loss = (1 - (mean_embedding(self.model, inputs) * self.targets[places]).sum(1)).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.topology.step()
            self.step += 1
            self.meter.loss_sum += float(loss.detach())
            self.meter.steps += 1

    def _next_batch(self) -> list[int]:
        if self._batches_at != self.step:  # the first of all, or gone on from a checkpoint
            batches = shuffled_batches(self.ids, self.config.batch_size, self.config.seed)
            self._batches = islice(batches, self.step, None)
        self._batches_at = self.step + 1
        return next(self._batches)

    def _schedule(self) -> float:
        rising = min(1.0, (self.step + 1) / max(1.0, WARM_UP_SHARE * self.total_steps))
        return rising * (1 - self.step / self.total_steps)


def is_trained(name: str) -> bool:
    """Whether a parameter, or the layer of this name, belongs to the blocks: not to the embeddings or a head.

    >>> is_trained("encoder.layer.0.output.dense"), is_trained("embeddings.word_embeddings"), is_trained("pooler.dense")
    (True, False, False)
    """
    return name.startswith("encoder.") or ".encoder." in name
