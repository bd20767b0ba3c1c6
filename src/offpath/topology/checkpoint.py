"""Whether a topology can go on from a state_dict: all of it is checked before anything is changed."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from offpath.topology.errors import TopologyError
from offpath.topology.managed import ManagedLayer
from offpath.topology.settings import in_words

STATE_VERSION = 1
NEXT_STEP = "pass on what state_dict() of a topology returned, whole"


def check_state(state: Any, recipe: str, layers: Sequence[ManagedLayer], rank: int) -> None:
    """Raise `TopologyError` unless a topology of `recipe` and `layers` can go on from `state` in process `rank`."""
    _check_entries(f"the state_dict of a topology, version {STATE_VERSION}", state, ("version",))
    if state["version"] != STATE_VERSION:
        raise TopologyError(
            f"expected the state_dict of a topology, version {STATE_VERSION}, got version {state['version']!r}; load "
            "it with the release of offpath that saved it, or begin with a new topology"
        )
    _check_entries("the state_dict of a topology", state, ("recipe", "step", "generator", "layers"))
    if state["recipe"] != recipe:
        raise TopologyError(_other_recipe(recipe, str(state["recipe"])))
    _check_entries("the layers of the state", state["layers"], ())
    names = [managed.name for managed in layers]
    if set(state["layers"]) != set(names):
        raise TopologyError(f"expected a state of the layers {names}, got one of {list(state['layers'])}")
    _check_whole("step", state["step"], least=0)
    _check_generator(state["generator"])
    for managed in layers:
        _check_layer(managed, state["layers"][managed.name])
        problem = managed.load_problem(state["layers"][managed.name], rank)
        if problem:
            raise TopologyError(problem)


def _other_recipe(ours: str, saved: str) -> str:
    """Names the settings in which the two differ, where they have a name and the same ones."""
    pairs = list(zip_longest(ours.split(", "), saved.split(", "), fillvalue=""))
    if pairs[0][0] != pairs[0][1] or any(a.rpartition("=")[0] != b.rpartition("=")[0] for a, b in pairs):
        return f"expected a state of the recipe {ours}, got one of {saved}"
    # A setting that follows another one's name in brackets: schedule=Every(update_freq=100.
    changed = [[one.rpartition("(")[2].rstrip(")") for one in pair] for pair in pairs if pair[0] != pair[1]]
    wanted, got = (", ".join(dict.fromkeys(side)) for side in zip(*changed, strict=True))
    return f"expected a state that was saved with {wanted}, got one with {got}; make the topology with that"


def _check_layer(managed: ManagedLayer, state: Any) -> None:
    what, layer = f"layer {managed.name!r}", managed.layer
    _check_entries(f"the state of {what}", state, ("initial_nnz", "digest", "unmoved"))
    _check_whole(f"{what}: initial_nnz", state["initial_nnz"], least=0)
    _check_whole(f"{what}: digest", state["digest"])
    # How many there are says whether the connections are those of the state, which is a question of its own.
    _check_tensor(f"{what}: unmoved", state["unmoved"], torch.bool, None)
    if "explored" in state:
        bytes_ = (layer.in_features * layer.out_features + 7) // 8
        _check_tensor(f"{what}: explored", state["explored"], torch.uint8, bytes_)
    if "history" in state:
        _check_entries(f"the history of {what}", state["history"], ("rank", "passes"))
        _check_passes(what, state["history"]["passes"], layer.in_features, layer.out_features)


def _check_entries(what: str, state: Any, keys: Sequence[str]) -> None:
    if not isinstance(state, Mapping):
        raise TopologyError(f"expected {what}, got {type(state).__name__}; {NEXT_STEP}")
    missing = [key for key in keys if key not in state]
    if missing:
        raise TopologyError(f"expected {what}, got one without {missing}; {NEXT_STEP}")


def _check_whole(what: str, number: Any, least: float = -math.inf) -> None:
    try:
        fits = operator.index(number) >= least
    except TypeError:
        fits = False
    if not fits:
        at_least = "" if least == -math.inf else f" of at least {least}"
        raise TopologyError(f"expected {what} to be a whole number{at_least}, got {number!r}; {NEXT_STEP}")


def _check_tensor(what: str, tensor: Any, dtype: torch.dtype, length: int | None) -> None:
    fits = isinstance(tensor, Tensor) and tensor.dtype == dtype and tensor.dim() == 1
    if not fits or length not in (None, len(tensor)):
        shape = "n" if length is None else length
        raise TopologyError(f"expected {what} to be a tensor [{shape}] in {dtype}, got {in_words(tensor)}; {NEXT_STEP}")


def _check_generator(state: Any) -> None:
    try:
        torch.Generator().set_state(state.cpu())
    except (AttributeError, TypeError, RuntimeError) as error:
        raise TopologyError(
            f"expected the state of a torch.Generator on the CPU, got {in_words(state)} ({error}); {NEXT_STEP}"
        ) from error


def _check_passes(what: str, passes: Any, in_features: int, out_features: int) -> None:
    for seen in passes if isinstance(passes, list | tuple) else [passes]:
        match seen:
            case (Tensor() as x, Tensor() as dy, Real()):
                if x.shape[-1:] == (in_features,) and dy.shape[-1:] == (out_features,):
                    continue
        got = ", ".join(map(in_words, seen)) if isinstance(seen, list | tuple) else in_words(seen)
        raise TopologyError(
            f"{what}: expected passes of a tensor [..., {in_features}], one [..., {out_features}] and a number, got "
            f"{got}; {NEXT_STEP}"
        )
