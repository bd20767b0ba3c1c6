"""A topology in Lightning's `Trainer`."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from offpath.topology import Topology, TopologyError
from offpath.trainers.follower import Follower, MakeTopology, statistics

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
except ImportError as error:
    raise ImportError(f"expected the package lightning ({error}); pip install 'offpath[lightning]'") from error


class TopologyCallback(Callback):
    """Changes the connections of a `LightningModule` while `Trainer.fit` trains it.

    `make(module, optimizer)` makes the topology when training begins: a recipe such as `offpath.SET`, or one with
    settings. Its step follows each step of the optimizer, in automatic and manual optimization, whatever accumulates or
    clips gradients. The topology's state is in every checkpoint; `fit(ckpt_path=...)` goes on from it. Statistics of
    each update go to the trainer's loggers, unless `log` is False. With several optimizers, `optimizer_index` says
    which one holds the sparse layers, and a `filter_fn` of the recipe leaves out layers of the others.
    Raises `TopologyError` when the topology cannot be made, several optimizers leave a choice, a checkpoint holds no
    state of it, or another callback averages weights.

    >>> import offpath
    >>> from functools import partial
    >>> rigl = TopologyCallback(partial(offpath.RigL, drop_fraction=0.3, update_freq=100, end_step=75_000))
    >>> trainer = Trainer(callbacks=[rigl], accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1)
    """

    def __init__(self, make: MakeTopology, *, optimizer_index: int | None = None, log: bool = True) -> None:
        self._make, self._optimizer_index, self._log = make, optimizer_index, log
        self._follower: Follower | None = None
        self._optimizer: Optimizer | None = None
        self._saved: dict[str, Any] | None = None

    @property
    def topology(self) -> Topology:
        """The topology, from the beginning of training on. Raises `TopologyError` before."""
        if self._follower is None:
            raise TopologyError("expected a training that has begun, got none; call trainer.fit(module) first")
        return self._follower.topology

    @property
    def state_key(self) -> str:
        """The name of the callback's state in a checkpoint."""
        return self._generate_state_key(optimizer_index=self._optimizer_index)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the topology."""
        return self._follower.state_dict() if self._follower else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint until the optimizer's has been loaded as well."""
        self._saved = state_dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier run has read."""
        self._saved = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the topology: the optimizers are there."""
        self._stop()
        for other in trainer.callbacks:
            if isinstance(other, StochasticWeightAveraging | WeightAveraging):
                raise TopologyError(
                    f"expected callbacks that leave weights where they are, got {type(other).__name__}: it averages "
                    "weights of different connections once they move. Average with an AveragedModel in also=[...] of "
                    "the topology instead"
                )
        self._optimizer = self._choose(trainer.optimizers)
        self._follower = Follower(self._make(pl_module, self._optimizer), self._optimizer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from the checkpoint: model and optimizer have been loaded."""
        if self._saved:
            assert self._follower is not None
            self._follower.load_state_dict(self._saved)
            self._saved = None
        elif trainer.global_step > 0 and trainer.ckpt_path:
            raise TopologyError(
                f"expected the state of a topology under {self.state_key!r} in {trainer.ckpt_path}, found none: it was "
                "saved without this callback. Load its weights into the module, and begin a new training"
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Expect a step."""
        if self._follower and getattr(optimizer, "optimizer", optimizer) is self._optimizer:
            self._follower.announce()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the updates of this batch did."""
        for update in self._follower.take_updates() if self._follower else ():
            for logger in trainer.loggers if self._log else ():
                logger.log_metrics(statistics(update), step=trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow no more; the topology can still be asked."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Follow no more."""
        self._stop()

    def _stop(self) -> None:
        if self._follower:
            self._follower.remove()

    def _choose(self, optimizers: list[Optimizer]) -> Optimizer:
        index = self._optimizer_index
        if index is None and len(optimizers) != 1:
            raise TopologyError(
                f"expected one optimizer, but configure_optimizers returned {len(optimizers)}; say with "
                "optimizer_index=... which one holds the sparse layers"
            )
        if index is not None and not 0 <= index < len(optimizers):
            raise TopologyError(f"expected optimizer_index below {len(optimizers)}, the optimizers, got {index}")
        return optimizers[index or 0]
