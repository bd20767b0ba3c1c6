"""`TopologyCallback` in transformers' own `Trainer`: one topology step an optimizer step, checkpoints, logs, errors."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import offpath
from offpath import SparseLinear
from offpath.topology import TopologyError
from offpath.trainers.transformers import TopologyCallback

MAKES: dict[str, Callable] = {
    "SET": partial(offpath.SET, update_freq=3, seed=7),
    "RigL": partial(offpath.RigL, update_freq=3, end_step=30),
    "GMP": partial(offpath.GMP, update_freq=3, end_step=11, final_sparsity=0.9),
}


class Samples(Dataset):
    """48 vectors and what they should become."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x, self.labels = (torch.randn(48, n, generator=generator) for n in (12, 6))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}


class Model(nn.Module):
    """Eleven sparse layers, so that their names sorted as text stand in another order than in the model."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = [12, *[8] * 10, 6]
        layers = [SparseLinear(*f, density=0.4, generator=generator) for f in itertools.pairwise(sizes)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x).tanh()
        return {"loss": (x - labels).square().mean()}


def _trainer(model: nn.Module, folder: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    settings = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 1}
    defaults = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 0.01, "logging_steps": 1000}
    arguments = TrainingArguments(str(folder), **settings | defaults | options)
    return Trainer(model, arguments, train_dataset=Samples(), callbacks=list(callbacks))


def _assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


class ByHand(Trainer):
    """Makes the topology's steps in the trainer's own loop: what the callback stands for."""

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args)
        topology, step = self.make(self.model, optimizer), optimizer.step

        def both(*arguments: Any) -> None:
            step(*arguments)
            topology.step()

        optimizer.step = both
        return optimizer


@pytest.mark.parametrize(("recipe", "accumulate"), [("SET", 2), ("RigL", 1), ("RigL", 5), ("GMP", 1)])
def test_training_equals_the_loop_by_hand(tmp_path: Path, one_thread: None, recipe: str, accumulate: int) -> None:
    callback, model, twin = TopologyCallback(MAKES[recipe]), Model(), Model()
    trainer = _trainer(model, tmp_path, callback, gradient_accumulation_steps=accumulate, max_grad_norm=0.1)
    trainer.train()
    by_hand = ByHand(twin, trainer.args, train_dataset=Samples())
    by_hand.make = MAKES[recipe]
    by_hand.train()
    assert callback.topology.step_count == trainer.state.global_step == {1: 24, 2: 12, 5: 6}[accumulate]
    _assert_same(model, twin)
    assert any(layer.unmoved < layer.initial_nnz for layer in callback.topology.survey())


def test_a_compiled_model_runs_uncompiled_while_it_is_watched(tmp_path: Path, one_thread: None) -> None:
    models = [Model(), Model()]
    for model in models:
        compiled = {"torch_compile": True, "torch_compile_backend": "eager"} if model is models[1] else {}
        _trainer(model, tmp_path, TopologyCallback(MAKES["RigL"]), **compiled).train()
    _assert_same(*models)
    calls = []
    torch.compile(lambda x: x + 1, backend=lambda graph, _: calls.append(graph) or graph)(torch.ones(1))
    assert calls, "what was compiled before is compiled again"


# Two steps before an update, one before, right after one; in the middle and at the end of an epoch.
@pytest.mark.parametrize(("recipe", "step"), [("SET", 4), ("RigL", 5), ("RigL", 6), ("RigL", 12), ("GMP", 5)])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, one_thread: None, recipe: str, step: int) -> None:
    saving = {"save_strategy": "steps", "save_steps": step}
    whole, first = Model(), TopologyCallback(MAKES[recipe])
    _trainer(whole, tmp_path, first, **saving).train()
    again, second = Model(seed=3), TopologyCallback(MAKES[recipe])  # other connections until the checkpoint is loaded
    trainer = _trainer(again, tmp_path / "again", second)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert trainer.state.global_step == second.topology.step_count == 24
    _assert_same(whole, again)
    assert str(first.topology.state_dict()) == str(second.topology.state_dict())


def test_a_model_of_the_library_itself(tmp_path: Path, one_thread: None) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        bert = BertForSequenceClassification(BertConfig(vocab_size=30, max_position_embeddings=8, **sizes))
        offpath.sparsify(bert, 0.5, seed=0)
        return bert

    words = torch.randint(30, (24, 8), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": int(row[0] > 15)} for row in words]
    models = model(), model()
    for bert, resume in zip(models, (None, str(tmp_path / "checkpoint-4")), strict=True):
        trainer = _trainer(bert, tmp_path, save_strategy="steps", save_steps=4)
        trainer.train_dataset = data
        trainer.add_callback(TopologyCallback(MAKES["RigL"]))
        trainer.train(resume_from_checkpoint=resume)
    _assert_same(*models)


def test_statistics_reach_the_log(tmp_path: Path) -> None:
    trainer = _trainer(Model(), tmp_path, TopologyCallback(MAKES["SET"]), num_train_epochs=1)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "topology/dropped" in entry)
    assert first["step"] == 3 and first["topology/dropped"] == first["topology/grown"] > 0
    assert {"topology/sparsity", "topology/moved_share", "topology/sparsity/layers.10", "epoch"} <= set(first)

    class Reporter(TrainerCallback):
        seen: ClassVar[list] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen.append((state.global_step, "topology/dropped" in logs, "loss" in logs))

    trainer = _trainer(Model(), tmp_path, Reporter(), num_train_epochs=1, logging_steps=6)
    trainer.add_callback(TopologyCallback(MAKES["SET"], log=trainer.log))
    trainer.train()
    moved, losses = ([step for step, *what in Reporter.seen if what[i]] for i in (0, 1))
    assert moved == [3, 6, 9, 12] and losses == [6, 12]


def test_training_again_begins_again(tmp_path: Path) -> None:
    model = Model()
    callback = TopologyCallback(MAKES["RigL"])
    trainer = _trainer(model, tmp_path, callback, max_steps=5)  # ends before a step that would be watched
    for _ in range(2):
        trainer.train()
        assert callback.topology.step_count == 5
        assert not model.layers[0]._forward_hooks


def test_checkpoints_that_cannot_be_gone_on_from(tmp_path: Path) -> None:
    _trainer(Model(), tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(TopologyError, match="found none: it was saved without this callback"):
        _trainer(Model(), tmp_path, TopologyCallback(MAKES["SET"])).train(resume_from_checkpoint=checkpoint)
    _trainer(
        Model(), tmp_path, TopologyCallback(MAKES["SET"]), save_strategy="steps", save_steps=2, max_steps=2
    ).train()
    with pytest.raises(TopologyError, match=r"expected a state of the recipe .*GMP"):
        _trainer(Model(), tmp_path, TopologyCallback(MAKES["GMP"])).train(resume_from_checkpoint=checkpoint)
    restoring = _trainer(
        Model(), tmp_path, TopologyCallback(MAKES["SET"]), restore_callback_states_from_checkpoint=True
    )
    with pytest.raises(TypeError, match="the topology is restored without it"):
        restoring.train(resume_from_checkpoint=checkpoint)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["TopologyCallback"]["attributes"]["topology"]["step"] == 2


def test_asking_too_early_is_an_error() -> None:
    with pytest.raises(TopologyError, match=r"call trainer\.train"):
        _ = TopologyCallback(offpath.SET).topology
