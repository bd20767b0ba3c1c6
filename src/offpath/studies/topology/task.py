"""What the images and the text of the study have in common: batches, a model of any size, a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from offpath.convert import fuse, sparsify
from offpath.studies.topology.config import GMP_, SMALL_DENSE, STATIC, Arm, TaskConfig

# How far the small dense net may be from the sparse one's number of parameters.
MATCH_TOLERANCE = 0.01


@dataclass(frozen=True)
class Score:
    """On data that was not trained on: the mean loss, and of images the share that was recognised."""

    loss: float
    accuracy: float | None


class Task(ABC):
    """One of the study's tasks with its data in memory; while `tuning`, part of the training data is held back."""

    config: TaskConfig
    source: str

    @property
    def title(self) -> str:
        """The data's name as it stands beside every figure; pictures that JPEG has changed are not quite the set."""
        return self.config.title + (" (JPEG)" if self.source.endswith("(JPEG)") else "")

    @abstractmethod
    def dense_model(self, sizes: tuple[int, ...]) -> nn.Module:
        """A dense model of these sizes, drawn from torch's generator; its last linear layer gives the classes."""

    @abstractmethod
    def dense_parameters(self, sizes: tuple[int, ...]) -> int:
        """How many numbers the dense model of these sizes trains."""

    @abstractmethod
    def narrower(self) -> Iterator[tuple[int, ...]]:
        """Sizes of dense nets to choose one from that has a given number of parameters, the most alike first."""

    @abstractmethod
    def batch(self, seed: int, step: int, tuning: bool) -> tuple[Tensor, Tensor]:
        """Inputs and classes of a step: they follow from the seed and the step alone."""

    @abstractmethod
    def score(self, model: nn.Module, tuning: bool) -> Score:
        """How well `model` does on what it was not trained on."""

    def model(self, arm: Arm, seed: int) -> nn.Module:
        """The model that `arm` starts with; torch's generator has been seeded."""
        if arm.method == SMALL_DENSE:
            return self.dense_model(self.matched_sizes(arm.sparsity))
        model = self.dense_model(self.config.sizes)
        if arm.sparsity:
            # GMP starts with all connections and prunes them.
            start, method = (0.0, "magnitude") if arm.method == GMP_ else (arm.sparsity, "random")
            last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
            sparsify(model, start, "uniform", lambda module, _: module is not last, method, seed)
            fuse(model)
        return model

    def matched_sizes(self, sparsity: float) -> tuple[int, ...]:
        """The sizes of the dense net with as many parameters as the sparse one has, within 1 %.

        Raises `ValueError` when there is none.
        """
        wanted = parameter_count(self.model(Arm(STATIC, sparsity), 0))
        for sizes in self.narrower():
            if abs(self.dense_parameters(sizes) / wanted - 1) <= MATCH_TOLERANCE:
                return sizes
        raise ValueError(f"expected a dense net of about {wanted} parameters for {self.config.name}, found none")


def parameter_count(model: nn.Module) -> int:
    """Trained numbers of the model: of sparse layers, those of the connections that exist."""
    return sum(parameter.numel() for parameter in model.parameters())


def open_task(config: TaskConfig, data: Path | None) -> Task:
    """Load the data of a task, from `data` where it is given. Raises `DataError` where it cannot be had."""
    # Late: each of them stands on this module.
    from offpath.studies.topology.images import Images
    from offpath.studies.topology.text import Text

    return Images(config, data) if config.kind == "images" else Text(config, data)
