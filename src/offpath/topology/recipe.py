"""A recipe: the parts that say when, what and how much."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from offpath.topology.budget import Budget
from offpath.topology.drop import DropRule
from offpath.topology.grow import GrowRule
from offpath.topology.schedules import Every


@dataclass(frozen=True)
class Recipe:
    """When `schedule` says so, the connections that `drop` finds least important go, and `grow` names new ones.

    `budget` says how many of both, layer by layer. Without a schedule nothing ever changes; without `grow`, connections
    only go. Raises `ValueError` for a schedule without `drop` or `budget`.
    """

    name: str
    schedule: Every | None = None
    drop: DropRule | None = None
    grow: GrowRule | None = None
    budget: Budget | None = None

    def __post_init__(self) -> None:
        if self.schedule is not None and (self.drop is None or self.budget is None):
            raise ValueError(f"recipe {self.name!r}: expected a drop rule and a budget beside the schedule")

    def describe(self) -> str:
        """All parts with their settings in words: two recipes that do the same have the same description."""
        return _describe(self)


def _describe(part: Any) -> str:
    if is_dataclass(part) and not isinstance(part, type):
        settings = (f"{field.name}={_describe(getattr(part, field.name))}" for field in fields(part))
        return f"{type(part).__name__}({', '.join(settings)})"
    return getattr(part, "__qualname__", None) or repr(part)
