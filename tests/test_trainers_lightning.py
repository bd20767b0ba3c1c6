"""`TopologyCallback` in Lightning's own `Trainer`: one topology step an optimizer step, checkpoints, logs, errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import offpath
from offpath import SparseLinear
from offpath.topology import TopologyError
from offpath.trainers.lightning import TopologyCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
MAKES: dict[str, Callable] = {
    "SET": partial(offpath.SET, update_freq=3, seed=7),
    "RigL": partial(offpath.RigL, update_freq=3, end_step=30),
    "GMP": partial(offpath.GMP, update_freq=3, end_step=11, final_sparsity=0.9),
}


def _data(samples: int = 48) -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(samples, n, generator=generator) for n in (12, 6))
    return DataLoader(TensorDataset(x, y), batch_size=4)


class Module(LightningModule):
    """Two sparse layers; `seed` decides their connections and values."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.body = nn.Sequential(
            SparseLinear(12, 10, density=0.4, generator=generator),
            nn.Tanh(),
            SparseLinear(10, 6, density=0.4, generator=generator),
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return (self.body(x) - y).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def _trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = (
        quiet | {"enable_model_summary": False, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1} | options
    )
    return Trainer(callbacks=list(callbacks), **settings)


def _by_hand(make: Callable, module: Module, accumulate: int, clip: float | None, epochs: int) -> None:
    """The loop that the callback stands for."""
    optimizer = module.configure_optimizers()
    topology = make(module, optimizer)
    for _ in range(epochs):
        batches = list(_data())
        for first in range(0, len(batches), accumulate):
            optimizer.zero_grad()
            for batch in batches[first : first + accumulate]:
                (module.training_step(batch, 0) / accumulate).backward()
            if clip:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            topology.step()


def _assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(
    ("recipe", "accumulate", "clip"), [("SET", 2, 0.1), ("RigL", 1, None), ("RigL", 3, 0.1), ("GMP", 1, None)]
)
def test_training_equals_the_loop_by_hand(one_thread: None, recipe: str, accumulate: int, clip: float | None) -> None:
    make, module, twin = MAKES[recipe], Module(), Module()
    callback = TopologyCallback(make)
    trainer = _trainer(callback, max_epochs=2, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    trainer.fit(module, _data())
    _by_hand(make, twin, accumulate, clip, epochs=2)
    assert callback.topology.step_count == trainer.global_step == 24 // accumulate
    _assert_same(module, twin)
    assert not torch.equal(module.body[0].crow_indices, Module().body[0].crow_indices)


def _resumed(recipe: str, folder: Path, seed: int, every: int, ckpt: str | None = None, **options: Any) -> tuple:
    module, callback = Module(seed), TopologyCallback(MAKES[recipe])
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=every, save_top_k=-1, filename="{step}")
    trainer = _trainer(callback, checkpoints, max_epochs=6, enable_checkpointing=True, **options)
    trainer.fit(module, _data(16), ckpt_path=ckpt)
    return module, trainer, callback.topology


# Ends of epochs, since a DataLoader does not say where it is: after an update, two before the next; one before; right
# after one.
@pytest.mark.parametrize(("recipe", "step"), [("SET", 8), ("RigL", 4), ("RigL", 8), ("RigL", 12), ("GMP", 8)])
def test_a_resumed_run_equals_an_uninterrupted_one(one_thread: None, tmp_path: Path, recipe: str, step: int) -> None:
    whole, trainer, topology = _resumed(recipe, tmp_path, 0, every=step)
    saved = tmp_path / f"step={step}.ckpt"
    # Other connections, other values, until the checkpoint is loaded.
    again, retrainer, retopology = _resumed(recipe, tmp_path, 3, every=step, ckpt=str(saved))
    assert trainer.global_step == retrainer.global_step == 24
    _assert_same(whole, again)
    states = [o.state[m.body[0].values] for m, o in ((whole, trainer.optimizers[0]), (again, retrainer.optimizers[0]))]
    assert torch.equal(states[0]["exp_avg"], states[1]["exp_avg"])
    assert str(topology.state_dict()) == str(retopology.state_dict())


def test_a_checkpoint_without_a_topology_is_refused(tmp_path: Path) -> None:
    trainer = _trainer(max_steps=2)
    trainer.fit(Module(), _data())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(TopologyError, match=r"plain\.ckpt, found none: it was saved without this callback"):
        _trainer(TopologyCallback(offpath.SET), max_steps=4).fit(Module(), _data(), ckpt_path=tmp_path / "plain.ckpt")


def test_training_again_begins_again() -> None:
    module, callback = Module(), TopologyCallback(MAKES["RigL"])
    for _ in range(2):  # each ends one step before an update that would be watched
        _trainer(callback, max_steps=5).fit(module, _data())
        assert callback.topology.step_count == 5
        assert not module.body[0]._forward_hooks


class Manual(Module):
    """Steps every other batch, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


def test_manual_optimization() -> None:
    callback = TopologyCallback(MAKES["RigL"])
    _trainer(callback, max_epochs=1).fit(Manual(), _data())
    assert callback.topology.step_count == 6
    assert sum(layer.initial_nnz - layer.unmoved for layer in callback.topology.survey()) > 0


class Two(Manual):
    """A sparse layer for each of two optimizers; the second one steps half as often."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        self.manual_backward(Module.training_step(self, batch, batch_idx))
        for optimizer in optimizers[: 1 + batch_idx % 2]:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.body[i].parameters(), lr=0.1) for i in (0, 2)]


def test_of_several_optimizers_one_is_chosen(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match="returned 2; say with optimizer_index"):
        _trainer(TopologyCallback(offpath.SET), max_epochs=1).fit(Two(), _data())
    with pytest.raises(TopologyError, match="below 2, the optimizers, got 2"):
        _trainer(TopologyCallback(offpath.SET, optimizer_index=2), max_epochs=1).fit(Two(), _data())
    callbacks = [
        TopologyCallback(
            partial(MAKES["RigL"], filter_fn=lambda _, fqn, at=f"body.{i}": fqn == at), optimizer_index=i // 2
        )
        for i in (0, 2)
    ]
    trainer = _trainer(*callbacks, max_epochs=1)
    trainer.fit(Two(), _data())
    assert [callback.topology.step_count for callback in callbacks] == [12, 6]
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert [state["step"] for state in saved.values()] == [12, 6]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_other_precisions(precision: Any) -> None:
    module, callback = Module(), TopologyCallback(MAKES["RigL"])
    module.body.insert(0, nn.Linear(12, 12))  # hands on what autocast makes of its output
    _trainer(callback, max_epochs=1, precision=precision).fit(module, _data())
    assert callback.topology.step_count == 12
    assert sum(layer.initial_nnz - layer.unmoved for layer in callback.topology.survey()) > 0


@pytest.mark.parametrize("other", [EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=0.1)])
def test_callbacks_that_average_other_connections_are_refused(other: Callback) -> None:
    with pytest.raises(TopologyError, match=rf"{type(other).__name__}: it averages .* AveragedModel in also="):
        _trainer(TopologyCallback(MAKES["SET"]), other, max_epochs=1).fit(Module(), _data())


def test_an_average_of_ones_own_moves_along() -> None:
    averages: list[AveragedModel] = []

    class Averaged(Module):
        def on_train_batch_end(self, *_: Any) -> None:
            averages[0].update_parameters(self.body)

    def make(module: Any, optimizer: Any) -> offpath.topology.Topology:
        averages.append(AveragedModel(module.body))
        return offpath.SET(module.body, optimizer, update_freq=3, also=averages)

    module = Averaged()
    _trainer(TopologyCallback(make), max_epochs=1).fit(module, _data())
    assert averages[0].module[0].pattern.equals(module.body[0].pattern)
    averages[0](torch.randn(2, 12))


def test_statistics_reach_the_logger(tmp_path: Path) -> None:
    for log in (True, False):
        logger = CSVLogger(tmp_path, name=str(log))
        _trainer(TopologyCallback(MAKES["SET"], log=log), max_epochs=1, logger=logger).fit(Module(), _data())
        table = Path(logger.log_dir) / "metrics.csv"
        assert table.exists() == log
    rows = [
        line.split(",") for line in (Path(tmp_path) / "True" / "version_0" / "metrics.csv").read_text().splitlines()
    ]
    assert {"topology/dropped", "topology/moved_share", "topology/sparsity/body.0", "step"} <= set(rows[0])
    assert [row[rows[0].index("step")] for row in rows[1:]] == ["3", "6", "9", "12"]


def test_asking_too_early_is_an_error() -> None:
    with pytest.raises(TopologyError, match=r"call trainer\.fit"):
        _ = TopologyCallback(offpath.SET).topology
