"""A recipe: the parts that say when, what and how much."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

from offpath.topology.budget import Budget
from offpath.topology.drop import DropRule
from offpath.topology.grow import GrowRule, gradient_steps
from offpath.topology.schedules import Every
from offpath.topology.settings import check_part, whole


@dataclass(frozen=True)
class Recipe:
    """When `schedule` says so, the connections that `drop` finds least important go, and `grow` names new ones.

    `budget` says how many of both, layer by layer. Without a schedule nothing ever changes; without `grow`, connections
    only go. Raises `ValueError` for a schedule without `drop` or `budget`, and for a part that is none.
    """

    name: str
    schedule: Every | None = None
    drop: DropRule | None = None
    grow: GrowRule | None = None
    budget: Budget | None = None

    def __post_init__(self) -> None:
        if self.schedule is not None and (self.drop is None or self.budget is None):
            raise ValueError(f"recipe {self.name!r}: expected a drop rule and a budget beside the schedule")
        if self.schedule is not None:
            check_part("schedule", self.schedule, "Every(update_freq=100)", "due")
        if self.drop is not None:
            check_part("drop", self.drop, "drop.magnitude", "__call__")
        if self.grow is not None:
            check_part("grow", self.grow, "grow.random", "__call__")
            if gradient_steps(self.grow):
                whole("gradient_steps of the grow rule", gradient_steps(self.grow), "give it an int")
        if self.budget is not None:
            check_part("budget", self.budget, "PerLayer(Constant(0.3))", "check", "__call__")

    def describe(self) -> str:
        """All parts with their settings in words: two recipes that do the same have the same description.

        Of an object of a class that is no dataclass and has no `__repr__`, this is the class alone.
        """
        return _describe(self)


def _describe(part: Any) -> str:
    if is_dataclass(part) and not isinstance(part, type):
        settings = (f"{field.name}={_describe(getattr(part, field.name))}" for field in fields(part))
        return f"{type(part).__name__}({', '.join(settings)})"
    if isinstance(part, partial):
        given = [*map(_describe, part.args), *(f"{k}={_describe(v)}" for k, v in sorted(part.keywords.items()))]
        return f"partial({', '.join([_describe(part.func), *given])})"
    name = getattr(part, "__qualname__", None)
    if name is None and type(part).__repr__ is object.__repr__:  # that says an address, another one in every process
        name = type(part).__qualname__
    return name or repr(part)
