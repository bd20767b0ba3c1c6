"""A topology in the `Trainer` of Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from offpath.topology import Topology, TopologyError
from offpath.trainers.follower import Follower, MakeTopology, statistics
from offpath.trainers.plain import from_plain, to_plain

try:
    import accelerate as _accelerate  # noqa: F401 (the Trainer needs it)
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(
        f"expected the packages transformers and accelerate ({error}); pip install 'offpath[transformers]'"
    ) from error

Log = Callable[[dict[str, float]], object]


class TopologyCallback(TrainerCallback, ExportableState):
    """Changes the connections of a model while transformers' `Trainer` trains it.

    `make(model, optimizer)` makes the topology when training begins: a recipe such as `offpath.SET`, or one with
    settings. Its step follows each step of the optimizer, whatever accumulates or clips gradients. Its state is in
    `trainer_state.json` of every checkpoint; `train(resume_from_checkpoint=...)` goes on from it. Statistics of each
    update go to `state.log_history`, or to `log`: with `trainer.add_callback(TopologyCallback(make, log=trainer.log))`
    they reach whatever the trainer reports to.
    Raises `TopologyError` when the topology cannot be made, or a checkpoint holds no state of it.

    >>> import offpath
    >>> from functools import partial
    >>> rigl = TopologyCallback(partial(offpath.RigL, drop_fraction=0.3, update_freq=100, end_step=75_000))
    """

    def __init__(self, make: MakeTopology, *, log: Log | None = None) -> None:
        if not callable(make):
            raise TypeError(
                f"expected a function that makes the topology, got {make!r}. If this comes from "
                "restore_callback_states_from_checkpoint=True, leave that out: the topology is restored without it"
            )
        self._make, self._log = make, log
        self._follower: Follower | None = None

    @property
    def topology(self) -> Topology:
        """The topology, from the beginning of training on. Raises `TopologyError` before."""
        if self._follower is None:
            raise TopologyError("expected a training that has begun, got none; call trainer.train() first")
        return self._follower.topology

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the topology."""
        saved = to_plain(self._follower.state_dict()) if self._follower else None
        # The args stand for what no JSON can hold; see what is said where they are refused.
        return {"args": {"make": "the function is not saved"}, "attributes": {"topology": saved}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Make the topology, and go on from a checkpoint: model and optimizer have been loaded."""
        assert model is not None
        self._stop()
        inner: Optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        follower = Follower(self._make(model, inner), inner)
        if state.global_step > 0:
            try:
                follower.load_state_dict(self._saved(state))
            except BaseException:
                follower.remove()
                raise
        self._follower = follower

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Expect a step."""
        if self._follower:
            self._follower.announce()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log what the updates of this step did."""
        for update in self._follower.take_updates() if self._follower else ():
            if self._log is None:
                state.log_history.append(statistics(update) | {"step": state.global_step, "epoch": state.epoch or 0.0})
                continue
            should_log = control.should_log
            self._log(statistics(update))
            control.should_log = should_log  # the trainer takes its own log for done otherwise

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Follow no more; the topology can still be asked."""
        self._stop()

    def _stop(self) -> None:
        if self._follower:
            self._follower.remove()

    def _saved(self, state: TrainerState) -> dict[str, Any]:
        callbacks: Any = state.stateful_callbacks  # declared as a list, a dict once it comes from a file
        stored = callbacks.get(type(self).__name__)
        if isinstance(stored, list):
            raise TopologyError(f"expected one {type(self).__name__} in a trainer, got {len(stored)}")
        saved = stored["attributes"]["topology"] if stored else None
        if saved is None:
            raise TopologyError(
                "expected the state of a topology in the checkpoint's trainer_state.json, found none: it was saved "
                "without this callback. Load its weights into the model, and begin a new training"
            )
        return dict(from_plain(saved))
