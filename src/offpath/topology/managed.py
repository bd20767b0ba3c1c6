"""The sparse layers that a topology looks after, and what it remembers of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offpath import pattern as patterns
from offpath.nn import SparseConv1d, SparseConv2d, SparseLinear, check_rewire
from offpath.nn.filters import FilterFn as FilterFn, check_filter
from offpath.nn.sparse_weight import SparseWeightModule
from offpath.pattern import Edit, PatternError
from offpath.topology.capture import Capture
from offpath.topology.carry import owns, state_problem
from offpath.topology.decide import Decision
from offpath.topology.errors import TopologyError
from offpath.topology.explored import Explored
from offpath.topology.layer import LayerView
from offpath.topology.record import LayerState


class ManagedLayer:
    """A sparse layer, its copies in other models (EMA), and what is remembered of it."""

    def __init__(self, name: str, layer: SparseLinear, copies: list[SparseLinear], record_explored: bool) -> None:
        self.name, self.layer, self.copies = name, layer, copies
        self.capture = Capture(layer)
        self.initial_nnz = layer.nnz
        self.unmoved = torch.ones(layer.nnz, dtype=torch.bool, device=layer.values.device)
        self.explored = Explored(layer.connections.pattern) if record_explored else None
        self.digest = self.digest_now()

    @property
    def frozen(self) -> bool:
        """Whether the layer is not trained at the moment: then its connections stay."""
        return not self.layer.values.requires_grad

    def digest_now(self) -> int:
        """A fingerprint of the layer's connections, as the layer keeps it."""
        return int(self.layer.topology_digest)

    def view(self, generator: torch.Generator, average: Callable[[Tensor], Tensor] = lambda mine: mine) -> LayerView:
        """The layer as the rules see it. Raises `TopologyError` when somebody else has changed its connections."""
        check_plain(self.name, self.layer)
        self._check_unchanged()
        values, gradient = self.layer.values.detach(), self.layer.values.grad
        pattern, capture = self.layer.connections.pattern, self.capture
        if not bool(values.isfinite().all()):
            raise TopologyError(f"layer {self.name!r}: expected finite weights, got NaN or inf")
        seen = capture.passes, capture.history
        return LayerView(self.name, pattern, values, generator, self.initial_nnz, gradient, *seen, average)

    def _check_unchanged(self) -> None:
        if self.digest_now() != self.digest:
            raise TopologyError(
                f"layer {self.name!r}: expected the connections that this topology left there, but they have changed "
                "since; after loading a model's checkpoint, load that of its topology as well"
            )

    def passes_problem(self) -> str | None:
        """Why what was seen of the step's passes cannot be read any more, or None."""
        if not self.capture.written_over:
            return None
        return (
            f"layer {self.name!r}: expected what went into it, and the gradient of what came out, to stay as they were "
            "until topology.step(), but one of them has been written over; feed the layer a tensor of its own, for "
            "example x.clone()"
        )

    def edit(self, decision: Decision, optimizer: Optimizer) -> Edit | None:
        """The decision as an edit that layer, copies and optimizer can follow; None where nothing changes."""
        if not decision.drop.numel() and not decision.grow.numel():
            return None
        if not owns(optimizer, self.layer.values):
            raise TopologyError(
                f"layer {self.name!r}: expected values that the topology's optimizer still holds, but they are another "
                "parameter now (load_state_dict with assign=True makes such); build optimizer and topology anew"
            )
        problem = state_problem(optimizer, self.layer.values)
        if problem:
            raise TopologyError(f"layer {self.name!r}: {problem}")
        columns = self.layer.in_features
        try:
            edit = patterns.edit(decision.pattern, decision.drop, (decision.grow // columns, decision.grow % columns))
            for one in (self.layer, *self.copies):
                check_rewire(one, edit)
        except PatternError as error:
            raise TopologyError(f"layer {self.name!r}: {error}") from error
        return edit

    def state(self) -> LayerState:
        """What has become of the layer; O(nnz). Raises `TopologyError` as `view` does."""
        self._check_unchanged()
        pattern = self.layer.connections.pattern
        rows, columns = pattern.shape
        live = pattern.row_counts > 0
        old = torch.bincount(pattern.row_indices()[self.unmoved.to(pattern.device)], minlength=rows) > 0
        dead, new = rows - int(live.sum()), int((live & ~old).sum())
        unmoved, explored = int(self.unmoved.sum()), self.explored.count if self.explored else None
        return LayerState(self.name, self.initial_nnz, pattern.nnz, rows * columns, unmoved, dead, new, explored)

    def state_dict(self, rank: int) -> dict[str, Any]:
        """What is remembered of the layer, and which process saves it where the passes that it has seen are in it."""
        state = {"initial_nnz": self.initial_nnz, "digest": self.digest, "unmoved": self.unmoved.clone()}
        if self.explored:
            state["explored"] = self.explored.state()
        if self.capture.history:
            state["history"] = {"rank": rank, "passes": [tuple(seen) for seen in self.capture.history]}
        return state

    def load_problem(self, state: Mapping[str, Any], rank: int) -> str | None:
        """Why the process `rank` cannot go on from `state`, or None."""
        if (recorded := "explored" in state) != (self.explored is not None):
            return (
                f"layer {self.name!r}: expected a state saved with record_explored={not recorded}, got one with "
                f"{recorded}; make the topology with that"
            )
        if state["digest"] != self.digest_now() or state["unmoved"].numel() != self.layer.nnz:
            return (
                f"layer {self.name!r}: expected the connections that were there when the state was saved, got "
                "other ones; load the model's checkpoint before that of its topology"
            )
        if any(copy.connections.digest() != state["digest"] for copy in self.copies):
            return (
                f"layer {self.name!r}: expected its copy in also=[...] to have the connections that were saved, got "
                "other ones; load the checkpoint of that model before that of the topology"
            )
        if "history" in state and state["history"]["rank"] != rank:
            return (
                f"layer {self.name!r}: expected a state saved by rank {rank}, got one of rank "
                f"{state['history']['rank']}: the passes that it has seen are in it; let each process save and load "
                "its own state, or save right after an update"
            )
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, which has no `load_problem`."""
        self.initial_nnz, self.digest = int(state["initial_nnz"]), int(state["digest"])
        self.unmoved = state["unmoved"].to(self.layer.values.device, torch.bool, copy=True)
        if self.explored:
            self.explored.load(state["explored"])
        self.capture.disarm()
        self.capture.load(state["history"]["passes"] if "history" in state else ())


def check_inside(model: nn.Module, managed: Sequence[ManagedLayer]) -> None:
    """Raise `TopologyError` unless the layers are still those of the model, which `densify` or a new head replaces."""
    inside = set(model.modules())
    for one in managed:
        if one.layer not in inside:
            raise TopologyError(
                f"layer {one.name!r}: expected the layer that was in the model when this topology was made, but it has "
                "been replaced since; call topology.close(), and build optimizer and topology anew"
            )


def check_plain(name: str, layer: SparseLinear) -> None:
    """Raise `TopologyError` unless this process holds all values of the layer, in a tensor of torch's own."""
    kind, count = type(layer.values.data), layer.connections.nnz
    if kind is not Tensor or layer.values.numel() != count:
        raise TopologyError(
            f"layer {name!r}: expected all {count} values in this process, in one plain tensor, got "
            f"{layer.values.numel()} in a {kind.__name__}. Sharded layers (fully_shard) train with the connections "
            "that they have, without a topology; to move connections, leave the sparse layers out of fully_shard, or "
            "use DistributedDataParallel"
        )


def managed_layers(
    model: nn.Module,
    optimizer: Optimizer,
    also: Sequence[nn.Module],
    filter_fn: FilterFn | None,
    record_explored: bool = False,
) -> list[ManagedLayer]:
    """The trainable sparse layers of `model` that `filter_fn` takes, each once.

    Raises `TopologyError` when there is none, when the optimizer does not own the values of one, or when `also` is no
    list of models that have a layer of the same name and connections.
    """
    check_filter(filter_fn)
    if not isinstance(also, Sequence) or not all(isinstance(other, nn.Module) for other in also):
        got = type(also).__name__ if isinstance(also, nn.Module) else repr(also)
        raise TopologyError(f"expected a list of models in also, got {got}; write also=[model]")
    chosen: dict[str, SparseLinear] = {}
    frozen = 0
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear) and (filter_fn is None or filter_fn(module, name)):
            if "values" not in module._parameters:
                raise TopologyError(
                    f"layer {name!r}: expected values that are a parameter, but a mask or weight_norm computes them, "
                    "or FullyShardedDataParallel, which shards them; remove that first"
                )
            if module.values.requires_grad:
                check_plain(name, module)
                chosen[name] = module
            else:
                frozen += 1
    if not chosen:
        advice = (
            f"{frozen} are frozen, which requires_grad_(True) changes"
            if frozen
            else "make some with offpath.sparsify(model, 0.9), or for GMP with sparsify(model, 0, method='magnitude'), "
            "before the optimizer is built"
        )
        raise TopologyError(
            "expected a model with trainable SparseLinear layers, found none"
            + (" that filter_fn takes" if filter_fn else "")
            + f"; {advice}"
            + (f". The connections of {staying} cannot be moved" if (staying := _staying(model, filter_fn)) else "")
        )
    owner = {
        id(module.values): name
        for name, module in model.named_modules()
        if isinstance(module, SparseWeightModule) and "values" in module._parameters and name not in chosen
    }
    for name, layer in chosen.items():
        if not owns(optimizer, layer.values):
            raise TopologyError(
                f"layer {name!r}: expected an optimizer that holds its values, but it is in no parameter group; "
                "build the optimizer after offpath.sparsify, or leave the layer out with filter_fn"
            )
        if owner.setdefault(id(layer.values), name) != name:
            raise TopologyError(
                f"layer {name!r}: expected values of its own, but they are tied to those of "
                f"{owner[id(layer.values)]!r}, whose connections would not move along"
            )
    sparse = [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]
    copies = [_twins(chosen, sparse, other) for other in also]
    if len({id(twin) for twins in copies for twin in twins.values()}) < len(copies) * len(chosen):
        raise TopologyError("expected each copy of the model once in also, got the same layers twice")
    return [
        ManagedLayer(name, layer, [twins[name] for twins in copies], record_explored) for name, layer in chosen.items()
    ]


def warn_of_staying(model: nn.Module, filter_fn: FilterFn | None) -> None:
    """Warn of sparse convolutions that `filter_fn` takes: a topology does not move their connections."""
    staying = _staying(model, filter_fn)
    if staying:
        warnings.warn(f"the connections of {staying} stay as they are: only those of SparseLinear move", stacklevel=4)


def _staying(model: nn.Module, filter_fn: FilterFn | None) -> str:
    convolutions = [
        f"{name!r} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, (SparseConv1d, SparseConv2d)) and (filter_fn is None or filter_fn(module, name))
    ]
    return ", ".join(convolutions)


def _twins(chosen: dict[str, SparseLinear], sparse: Collection[str], other: nn.Module) -> dict[str, SparseLinear]:
    """The layers of `other` by the names that they have in the model; wrappers put a prefix before all of them.

    Another part of `other` may have layers of these names as well: the copy is where all `sparse` ones of the model
    are, and their connections.
    """
    layers = {name: module for name, module in other.named_modules() if isinstance(module, SparseLinear)}
    first = next(iter(chosen))
    prefixes = [
        name.removesuffix(first).rstrip(".") for name in layers if f".{name}".endswith(f".{first}" * bool(first))
    ]
    problem = f"expected a copy of the model in also, but found no SparseLinear {first!r} in it"
    for prefix in sorted(prefixes, key=lambda p: (any(_join(p, name) not in layers for name in sparse), len(p))):
        twins = {name: layers.get(_join(prefix, name)) for name in chosen}
        found = {name: twin for name, twin in twins.items() if twin is not None}
        if len(found) == len(chosen):
            told = _twin_problem(chosen, found)
            if told is None:
                return found
            problem = told
    raise TopologyError(problem)


def _join(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)


def _twin_problem(chosen: dict[str, SparseLinear], twins: dict[str, SparseLinear]) -> str | None:
    for name, twin in twins.items():
        if twin is chosen[name]:
            return f"layer {name!r}: expected a copy in also, got the model itself"
        if twin.connections.digest() != chosen[name].connections.digest():
            return f"layer {name!r}: expected the same connections in the copy in also, got other ones"
    return None
