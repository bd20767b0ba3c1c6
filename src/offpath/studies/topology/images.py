"""Recognising images with an MLP."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from offpath.studies.data import load
from offpath.studies.models import mlp
from offpath.studies.run import EVALUATION_BATCH
from offpath.studies.topology.config import TaskConfig
from offpath.studies.topology.task import Score, Task

HELD_BACK_SHARE = 0.1


class Images(Task):
    """The images of a data set in random order, each mirrored from left to right half of the time.

    Tuning holds back a tenth of the training images, always the same; only the other trials see the test images, and
    these train on all training images.
    """

    def __init__(self, config: TaskConfig, data: Path | None) -> None:
        self.config = config
        self.dataset = load(config.data, data)
        self.source = self.dataset.source
        self._all = torch.arange(len(self.dataset.train_labels))
        shuffled = torch.randperm(len(self._all), generator=torch.Generator().manual_seed(0))
        held_back = int(HELD_BACK_SHARE * len(shuffled))
        self._held_back, self._kept = shuffled[:held_back], shuffled[held_back:]
        self._order: tuple[tuple[int, int, bool], Tensor] | None = None

    def dense_model(self, sizes: tuple[int, ...]) -> nn.Module:
        return mlp(sizes)(self.dataset.features, self.dataset.classes)

    def dense_parameters(self, sizes: tuple[int, ...]) -> int:
        widths = (self.dataset.features, *sizes, self.dataset.classes)
        return sum((inputs + 1) * outputs for inputs, outputs in pairwise(widths))

    def narrower(self) -> Iterator[tuple[int, ...]]:
        first, second = self.config.sizes
        pairs = [(one, two) for one in range(1, first) for two in range(1, second)]
        # Both layers by the same factor, as nearly as whole units allow.
        shapes = sorted(pairs, key=lambda pair: abs(pair[0] / first - pair[1] / second))
        return iter(shapes)

    def batch(self, seed: int, step: int, tuning: bool) -> tuple[Tensor, Tensor]:
        among = self._kept if tuning else self._all
        epoch, place = divmod(step, -(-len(among) // self.config.batch_size))
        if self._order is None or self._order[0] != (seed, epoch, tuning):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            self._order = (seed, epoch, tuning), among[torch.randperm(len(among), generator=generator)]
        chosen = self._order[1][place * self.config.batch_size : (place + 1) * self.config.batch_size]
        images = self.dataset.train_images[chosen]
        mirrored = images.view(len(chosen), *self.dataset.image_shape).flip(2).view_as(images)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        tossed = torch.rand(len(chosen), 1, generator=generator) < 0.5
        return torch.where(tossed, mirrored, images), self.dataset.train_labels[chosen]

    @torch.no_grad()
    def score(self, model: nn.Module, tuning: bool) -> Score:
        data = self.dataset
        images, labels = data.test_images, data.test_labels
        if tuning:
            images, labels = data.train_images[self._held_back], data.train_labels[self._held_back]
        loss_sum, correct = 0.0, 0
        for some, classes in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
            logits = model(some)
            loss_sum += float(functional.cross_entropy(logits, classes, reduction="sum"))
            correct += int((logits.argmax(1) == classes).sum())
        return Score(loss_sum / len(labels), correct / len(labels))
