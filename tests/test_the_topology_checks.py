"""Deliberately wrong drops, growths and carries; every check that a row names must reject its mutant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import offpath
from offpath.pattern import Edit
from offpath.topology import LayerView, capture, carry, drop, select
from topology_checks import OPTIMIZERS, check_average, check_scores, check_update
from topology_oracle import check_exact, check_network

CHECKS: dict[str, Callable[[], None]] = {
    "exact SET": lambda: check_exact("SET"),
    "exact RigL": lambda: check_exact("RigL"),
    "exact momentum": lambda: check_exact("momentum"),
    "exact MEST": lambda: check_exact("MEST"),
    "exact GMP": lambda: check_exact("GMP from dense"),
    "exact global": lambda: check_exact("SET global"),
    "exact global GMP": lambda: check_exact("GMP global"),
    "network RigL": lambda: check_network("RigL", torch.optim.Adam),
    "update": lambda: check_update(lambda m, o: offpath.SET(m, o, update_freq=4), OPTIMIZERS["Adam"]),
    "average": lambda: check_average(0.9),
    "scores": lambda: check_scores(passes=2, calls=2, leading=(3,)),
}


@dataclass(frozen=True)
class Mutant:
    name: str
    target: str
    wrong: Any
    rejected_by: tuple[str, ...]


_carry, _lowest, _draw_free, _carry_state = Edit.carry, select.lowest, LayerView.draw_free, carry.carry_state


def _stays_in_its_slots(self: Edit, slots: Tensor, fill: float = 0.0) -> Tensor:
    return slots.clone() if slots.numel() == self.new_to_old.numel() else _carry(self, slots, fill)


def _grown_inherit(self: Edit, slots: Tensor, fill: float = 0.0) -> Tensor:
    carried = _carry(self, slots, fill)
    carried[self.grown_slots] = slots[self.old_to_new < 0][: self.grown_slots.numel()]
    return carried


def _rounds_survivors(self: Edit, slots: Tensor, fill: float = 0.0) -> Tensor:
    carried = _carry(self, slots, fill)
    return carried.bfloat16().to(carried.dtype) if carried.is_floating_point() else carried


def _drops_the_largest(scores: Tensor, count: int) -> Tensor:
    return _lowest(-scores, count)


def _one_too_few(scores: Tensor, count: int) -> Tensor:
    return _lowest(scores, max(count - 1, 0))


def _ties_to_the_higher_index(scores: Tensor, count: int) -> Tensor:
    return (scores.numel() - 1 - _lowest(scores.flip(0), count)).flip(0)


def _grows_the_first_free_ones(self: LayerView, count: int) -> Tensor:
    return _draw_free(self, self.free_count)[:count]


def _grows_where_it_just_dropped(self: LayerView, count: int) -> Tensor:
    return self.positions[_lowest(self.values.abs(), count)]


def _last_pass_alone(self: LayerView, first: int, last: int) -> Tensor:
    x, dy, _ = self._operands[-1]
    return dy[:, first:last].t() @ x


def _gradient_off_by_a_row(self: LayerView, first: int, last: int) -> Tensor:
    return sum(dy.roll(1, 1)[:, first:last].t() @ x for x, dy, _ in self._operands)  # type: ignore[return-value]  # never empty


def _all_steps_alike(self: LayerView, first: int, last: int) -> Tensor:
    return sum(dy[:, first:last].t() @ x for x, dy, _ in self._operands)  # type: ignore[return-value]  # never empty


def _ages_only_what_is_new(self: capture.Capture, decay: float) -> None:
    older, self.history = self.history, ()
    _age(self, decay)
    self.history = (*older, *self.history)


def _keeps_no_history(self: capture.Capture, decay: float) -> None:
    self.clear()


class _FirstCallAlone(capture._Hook):
    def __call__(self, layer, args, kwargs, y) -> None:
        if not self.passes:
            super().__call__(layer, args, kwargs, y)


def _raw_gradient(self: LayerView, first: int, last: int) -> Tensor:
    # Signed scores: only the check of the whole recipe can tell, since the scores themselves are right.
    return sum(dy[:, first:last].t() @ x for x, dy, _ in self._operands).clamp(min=0)  # type: ignore[union-attr]  # never empty


def _forgets_the_first_moment(optimizer, parameter, edit: Edit, grown_state) -> None:
    held = optimizer.state[parameter].pop("exp_avg", None)
    _carry_state(optimizer, parameter, edit, grown_state)
    if held is not None:
        optimizer.state[parameter]["exp_avg"] = held


def _resets_all_state(optimizer, parameter, edit: Edit, grown_state) -> None:
    for entry in optimizer.state[parameter].values():
        if isinstance(entry, Tensor):
            entry.zero_()


def _grown_begin_with_other_values(layer, edit: Edit, grown: Tensor | None = None) -> None:
    _rewire(layer, edit, layer.values.detach()[: edit.grown_slots.numel()].clone())


_rewire = offpath.nn.rewire
_age = capture.Capture.age
ROOM = "offpath.topology."
WRONG_MEST = ROOM + "drop.MagnitudeAndGradient.__call__"
MUTANTS = (
    Mutant("moments stay in their slots", "offpath.pattern.Edit.carry", _stays_in_its_slots, ("update", "exact SET")),
    Mutant("the grown inherit", "offpath.pattern.Edit.carry", _grown_inherit, ("update", "average", "exact SET")),
    Mutant("survivors are rounded", "offpath.pattern.Edit.carry", _rounds_survivors, ("update", "average")),
    Mutant("no state moves", ROOM + "controller.carry_state", lambda *_: None, ("update", "exact SET", "network RigL")),
    Mutant("one moment stays", ROOM + "controller.carry_state", _forgets_the_first_moment, ("update", "network RigL")),
    Mutant("all state is reset", ROOM + "controller.carry_state", _resets_all_state, ("update", "exact SET")),
    Mutant("grown values", ROOM + "controller.rewire", _grown_begin_with_other_values, ("update", "average")),
    Mutant("drops the largest", ROOM + "decide.lowest", _drops_the_largest, ("exact SET", "exact GMP")),
    Mutant("drops one too few", ROOM + "decide.lowest", _one_too_few, ("exact SET", "exact GMP", "exact global")),
    Mutant("ties go up", ROOM + "decide.lowest", _ties_to_the_higher_index, ("exact SET", "exact MEST")),
    Mutant("ties of the budget go up", ROOM + "budget.lowest", _ties_to_the_higher_index, ("exact global GMP",)),
    Mutant("ties of growth go up", ROOM + "select.lowest", _ties_to_the_higher_index, ("exact RigL",)),
    Mutant("grows the first free", ROOM + "LayerView.draw_free", _grows_the_first_free_ones, ("exact SET",)),
    Mutant("regrows the dropped", ROOM + "LayerView.draw_free", _grows_where_it_just_dropped, ("update", "exact SET")),
    Mutant("last pass alone", ROOM + "LayerView.gradient_of_rows", _last_pass_alone, ("scores", "exact momentum")),
    Mutant("all steps alike", ROOM + "LayerView.gradient_of_rows", _all_steps_alike, ("exact momentum",)),
    Mutant("aged once", ROOM + "capture.Capture.age", _ages_only_what_is_new, ("exact momentum",)),
    Mutant("no history", ROOM + "capture.Capture.age", _keeps_no_history, ("exact momentum",)),
    Mutant("a row off", ROOM + "LayerView.gradient_of_rows", _gradient_off_by_a_row, ("scores", "exact RigL")),
    Mutant("signed scores", ROOM + "LayerView.gradient_of_rows", _raw_gradient, ("scores", "exact RigL")),
    Mutant("first call alone", ROOM + "capture._Hook", _FirstCallAlone, ("scores",)),
    Mutant("no gradient in MEST", WRONG_MEST, lambda _, x: drop.magnitude(x), ("exact MEST",)),
    Mutant("linear, not cubic", ROOM + "Cubic.__call__", lambda s, t: max(0.0, 1 - t / s.end_step), ("exact GMP",)),
    Mutant("no cosine", ROOM + "Cosine.__call__", lambda s, t: s.drop_fraction, ("exact RigL", "network RigL")),
    Mutant("a step late", ROOM + "Every.due", lambda s, t: t % s.update_freq == 1, ("exact SET", "exact GMP")),
)  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_rejected(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutant.target, mutant.wrong)
    for check in mutant.rejected_by:
        with pytest.raises(AssertionError):
            CHECKS[check]()


@pytest.mark.parametrize("check", CHECKS)
def test_the_package_is_accepted(check: str) -> None:
    CHECKS[check]()


def test_every_check_rejects_something() -> None:
    assert {check for mutant in MUTANTS for check in mutant.rejected_by} == set(CHECKS)
