"""An optimizer's memory of a weight goes where the weight goes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping
from numbers import Real
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offpath.pattern import Edit
from offpath.topology.errors import TopologyError

MEAN = "mean"
# What a state may refer to without keeping it.
NOT_STATE = (str, bytes, int, float, type, FunctionType, ModuleType, Optimizer)


def check_grown_state(grown_state: Mapping[str, float | str], keys: Collection[str] | None = None) -> None:
    """Raises `TopologyError` for what is neither a finite number nor "mean", and for a key beside `keys` if given."""
    for key, begin in grown_state.items():
        if begin != MEAN and not (isinstance(begin, Real) and math.isfinite(begin)):
            raise TopologyError(f'expected grown_state[{key!r}] to be a finite number or "mean", got {begin!r}')
        if keys is not None and key not in keys:
            raise TopologyError(
                f"expected the keys of grown_state to be those of the optimizer's state that have an entry for each "
                f"connection ({', '.join(map(repr, sorted(keys))) or 'here none'}), got {key!r}"
            )


def check_optimizer(optimizer: Optimizer, keeps_nnz: bool, moves: bool) -> None:
    """Raises `TopologyError` for what is none, and, for a recipe that `moves`, where its state cannot follow.

    That is a state that cannot be told apart by parameter; and, unless a recipe `keeps_nnz`, weights that are handed on
    in memory laid out for their old sizes.
    """
    if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")):
        raise TopologyError(
            f"expected the optimizer that trains the model, got {type(optimizer).__name__}; make one after sparsify, "
            "and hand it over"
        )
    if not moves:
        return
    if any(isinstance(one, torch.optim.LBFGS) for one in _with_inner(optimizer)):
        raise TopologyError(
            "expected an optimizer with a state of its own for each parameter, got LBFGS, which keeps one flat history "
            "of all parameters together: it cannot follow a connection that moves. Take another optimizer, or "
            "offpath.Static"
        )
    if not keeps_nnz and getattr(optimizer, "parameters_as_bucket_view", False):
        raise TopologyError(
            f"expected an optimizer that follows weights of another size, as this recipe makes them, got "
            f"{type(optimizer).__name__} with parameters_as_bucket_view=True, which would go on sending their old "
            "memory to the other processes; make it without"
        )


def owns(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether `parameter` is in one of the optimizer's parameter groups."""
    return any(p is parameter for group in optimizer.param_groups for p in group["params"])


def state_problem(optimizer: Optimizer, parameter: nn.Parameter) -> str | None:
    """Why the optimizer's state of `parameter` [nnz] cannot be moved with its connections; None if it can."""
    for one in _with_inner(optimizer):
        for name, by_weight in one.state.items():
            if isinstance(name, Tensor) or not isinstance(by_weight, Mapping):
                continue
            # TRAC keeps its reference weights so.
            of_weight = [kept for weight, kept in by_weight.items() if weight is parameter]
            if _tensors_inside(of_weight, parameter):
                return (
                    f"expected {type(one).__name__} to keep what belongs to a weight in the state of that weight, got "
                    f"some under {name!r}; it cannot follow a connection that moves"
                )
    for key, entry in state_entries(optimizer, parameter):
        tensors = [entry] if isinstance(entry, Tensor) else _tensors_inside(entry, parameter)
        if isinstance(entry, Tensor) and type(entry) not in (Tensor, nn.Parameter):
            return (
                f"expected the state {key!r} of {type(optimizer).__name__} in a plain tensor, got a "
                f"{type(entry).__name__}; it cannot follow a connection that moves"
            )
        if isinstance(entry, Tensor) and entry.shape == parameter.shape and entry.device != parameter.device:
            return (
                f"expected the state {key!r} of {type(optimizer).__name__} on {parameter.device}, where its weight is, "
                f"got it on {entry.device}; it cannot follow a connection that moves"
            )
        if isinstance(entry, Tensor) and (entry.shape == parameter.shape or entry.numel() == 1):
            continue
        if tensors:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors[:3])
            return (
                f"expected the state {key!r} of {type(optimizer).__name__} to have one entry for each of the "
                f"{parameter.numel()} connections, got {shapes}; it cannot follow a connection that moves"
            )
    return None


@torch.no_grad()
def carry_state(
    optimizer: Optimizer, parameter: nn.Parameter, edit: Edit, grown_state: Mapping[str, float | str]
) -> None:
    """Move every state tensor of one entry per connection through `edit`; survivors keep their bits.

    A grown connection starts as the optimizer starts a new weight, in nearly all of them with zero; `grown_state` names
    other numbers by the key of the state, or "mean" for the mean of what the layer's connections had. Single numbers
    (step counters) stay. As long as the count of connections stays, tensors are written in place.
    """
    moved: list[tuple[Tensor, Tensor]] = []
    for one in _with_inner(optimizer):
        state = _state(one, parameter)
        for key, entry in state.items():
            if not isinstance(entry, Tensor) or entry.shape != edit.old_to_new.shape:
                continue
            # A ZeroRedundancyOptimizer that has loaded a checkpoint shares tensors with the one inside it.
            known = next((there for before, there in moved if before is entry), None)
            if known is None:
                begin = grown_state.get(key, _initial(one, parameter, key))
                known = _carried(entry, edit, begin)
                moved.append((entry, known))
            state[key] = known


def _carried(entry: Tensor, edit: Edit, begin: float | str) -> Tensor:
    if begin == MEAN:
        begin = float(entry.double().mean()) if entry.numel() else 0.0
    carried = edit.carry(entry, float(begin))
    return entry.copy_(carried) if carried.shape == entry.shape else carried


def state_entries(optimizer: Optimizer, parameter: nn.Parameter) -> list[tuple[str, Any]]:
    """The optimizer's state of `parameter`, with that of the optimizers inside it."""
    return [entry for one in _with_inner(optimizer) for entry in _state(one, parameter).items()]


def _with_inner(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizer and those that it keeps, such as ZeroRedundancyOptimizer, if they have a state of their own."""
    found = [optimizer]
    for one in found:  # grows
        kept = (inner for inner in vars(one).values() if isinstance(inner, Optimizer))
        found += [inner for inner in kept if all(inner.state is not known.state for known in found)]
    return found


def _state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    # Asked for with get: a look must not add an entry to the defaultdict that a checkpoint would then hold. Where a
    # ZeroRedundancyOptimizer has loaded one, the parameters of other processes have None.
    return optimizer.state.get(parameter) or {}


def _tensors_inside(entry: Any, parameter: Tensor) -> list[Tensor]:
    """Those of several numbers in containers and in the attributes of objects, but for `parameter`, however deep."""
    found, pending, seen = [], [entry], {id(parameter)}
    while pending:
        one = pending.pop()
        if id(one) in seen or isinstance(one, NOT_STATE):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            found += [one] if one.numel() != 1 else []
        elif isinstance(one, Mapping):
            pending += one.values()
        elif isinstance(one, list | tuple | set | frozenset | deque):
            pending += one
        else:
            pending += getattr(one, "__dict__", {}).values()
            pending += (getattr(one, slot, None) for slot in getattr(type(one), "__slots__", ()))
    return found


def _initial(optimizer: Optimizer, parameter: nn.Parameter, key: str) -> float:
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    if isinstance(optimizer, torch.optim.Adagrad) and key == "sum":
        return float(group["initial_accumulator_value"])
    if isinstance(optimizer, torch.optim.Rprop) and key == "step_size":
        return float(group["lr"])
    return 0.0
