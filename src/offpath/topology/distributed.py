"""Many processes, one topology: all decide from the same numbers, and digests hold them to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from offpath.nn.compiled import inside_compiled
from offpath.nn.sparse_weight import SparseWeightModule
from offpath.topology.errors import TopologyError
from offpath.topology.layer import LayerView, empty_pass

if distributed.is_available():
    # Its functions keep the process group that is there when they are imported, as a default, and a
    # `DistributedDataParallel` imports them. Imported before there is one, they keep none; later, the group would never
    # be destroyed, and one of its threads could abort a process that ends.
    import torch.distributed.nn.functional

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What must be the same in every process, and what to do where it is not.
NEXT_STEPS = {
    "recipe and layers": "give every process the same model, recipe and settings",
    "steps": "call topology.step() as often in every process, and load the same checkpoint in all of them",
    "random state": "give the topology the same seed in every process",
    "connections": "build the model from one seed in every process, or load one checkpoint in all of them, before "
    "wrapping it",
    "weights": "wrap the model in DistributedDataParallel, and let the last backward pass before optimizer.step() run "
    "outside no_sync(); where machines round differently, broadcast the parameters from rank 0 before topology.step()",
    "success": "a process could not decide; its own error says why",
    "decision": "a drop or grow rule may only read what is the same everywhere (values, gradient, gradient_of_rows), "
    "and draw from layer.generator",
}


class Processes:
    """The processes that train one model together; with one process, nothing here communicates.

    They are those of `group`, else those of the `DistributedDataParallel` around the model, else all. That wrapper has
    layers of `sizes` connections; None: of sizes that may have changed since, and that will.
    """

    def __init__(self, model: nn.Module, group: ProcessGroup | None, sizes: list[int] | None) -> None:
        self._wrapper = model if isinstance(model, DistributedDataParallel) else None
        if group is None and self._wrapper is not None:
            group = self._wrapper.process_group
        self._group = group
        self._sizes = sizes
        self.count = distributed.get_world_size(group) if _is_initialized() else 1
        self.rank = distributed.get_rank(group) if _is_initialized() else 0

    def average(self, tensor: Tensor) -> Tensor:
        """The mean of `tensor` over all processes, in place: what `DistributedDataParallel` does to a gradient."""
        if self.count > 1:
            distributed.all_reduce(tensor, group=self._group)
            tensor /= self.count
        return tensor

    def check_same(self, device: torch.device, **facts: int) -> None:
        """Raise `TopologyError`, in every process, unless each of the `facts` is the same in all of them."""
        if self.count == 1:
            return
        mine = torch.tensor(list(facts.values()), device=device)
        gathered = [torch.empty_like(mine) for _ in range(self.count)]
        distributed.all_gather(gathered, mine, group=self._group)
        for what, of_ranks in zip(facts, torch.stack(gathered).t().tolist(), strict=True):
            name, others = what.replace("_", " "), [rank for rank, fact in enumerate(of_ranks) if fact != of_ranks[0]]
            if others:
                raise TopologyError(
                    f"expected the same {name} in all {self.count} processes, but rank {', '.join(map(str, others))} "
                    f"differs from rank 0; {NEXT_STEPS[name]}"
                )

    def agree(self, device: torch.device, *decided: Tensor) -> None:
        """Raise `TopologyError`, in every process, unless all have come here and decided the same."""
        self.check_same(device, success=1, decision=fingerprint(*decided))

    @contextmanager
    def telling_failure(self, device: torch.device) -> Iterator[None]:
        """Let the others, who wait in `agree`, know that this process could not decide.

        Nothing in it may communicate, or this would be taken for an answer.
        """
        try:
            yield
        except Exception:
            with suppress(TopologyError):
                self.check_same(device, success=0, decision=0)
            raise

    def with_all_passes(self, layers: Sequence[LayerView]) -> list[LayerView]:
        """A layer that only other processes' batches went through has a gradient of zero in this one."""
        if self.count == 1:
            return list(layers)
        seen = torch.tensor([len(layer.passes) for layer in layers], device=layers[0].values.device)
        distributed.all_reduce(seen, group=self._group)
        return [
            layer if layer.passes or not anywhere else replace(layer, passes=(empty_pass(layer),))
            for layer, anywhere in zip(layers, seen.tolist(), strict=True)
        ]

    def follow(self, sizes: list[int]) -> None:
        """Let the `DistributedDataParallel` around the model know that its layers have `sizes` connections now.

        It has laid out its buckets for the old sizes, and lost its hooks with the old parameters' gradients. What it
        does to come out of a pickle makes both anew. Raises `TopologyError` where that is
        not possible: gradients would no longer be reduced, some of them in silence.
        """
        if sizes == self._sizes or (self.count == 1 and self._wrapper is None):
            return  # one process may have wrapped the model as well
        problem = self._resize_problem()
        if problem:
            raise TopologyError(
                f"expected a model whose layers may change their number of connections in all {self.count} processes, "
                f"as this recipe or checkpoint asks; {problem}"
            )
        assert self._wrapper is not None
        self._sizes = sizes
        self._wrapper.__setstate__(self._wrapper.__getstate__())
        for hook, state in self._wrapper._comm_hooks:
            distributed._register_comm_hook(self._wrapper.reducer, state, hook)

    def _resize_problem(self) -> str | None:
        if self._wrapper is None:
            return "pass the DistributedDataParallel itself in place of the model inside it"
        if self._wrapper.static_graph:
            return "wrap the model without static_graph=True, which promises that its parameters stay"
        if self._wrapper.process_group is not distributed.group.WORLD:
            return "wrap the model without a process_group: only in the default one can it be laid out anew"
        return None


def check_same_connections(model: nn.Module, process_group: ProcessGroup | None = None) -> None:
    """Raise `TopologyError`, in every process, unless the sparse layers of `model` connect the same in all of them.

    For wrappers that say nothing of it, such as `fully_shard`, before any forward pass; all processes of
    `process_group` (default: all there are) have to call it. With one process, there is nothing to compare.

    >>> from offpath import SparseLinear
    >>> check_same_connections(nn.Sequential(SparseLinear(4, 2), nn.ReLU()))
    """
    layers = [module.connections for module in model.modules() if isinstance(module, SparseWeightModule)]
    device = layers[0].device if layers else torch.get_default_device()
    connections = fingerprint([layer.digest() for layer in layers])
    Processes(model, process_group, None).check_same(device, connections=connections)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `DistributedDataParallel` and `torch.compile`: layers are called the same with and without."""
    model = inside_compiled(model)
    return inside_compiled(model.module) if isinstance(model, DistributedDataParallel) else model


def fingerprint(*parts: object) -> int:
    """64 bits of the contents of tensors and of what else `repr` says."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        else:
            digest.update(repr(part).encode())
    return int.from_bytes(digest.digest(), "little", signed=True)


def _is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()
