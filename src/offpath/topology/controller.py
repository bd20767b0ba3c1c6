"""`Topology`: carries out a recipe while a model trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offpath.nn import rewire
from offpath.pattern import Edit
from offpath.topology.carry import carry_state, check_grown_state, check_optimizer, state_entries
from offpath.topology.checkpoint import STATE_VERSION, check_state
from offpath.topology.decide import Decision, decide_drops, decide_growth
from offpath.topology.distributed import Processes, fingerprint, unwrapped
from offpath.topology.errors import TopologyError
from offpath.topology.grow import gradient_decay, gradient_steps, needs_dense_gradient
from offpath.topology.layer import LayerView, with_unused
from offpath.topology.managed import FilterFn, ManagedLayer, check_inside, check_plain, managed_layers, warn_of_staying
from offpath.topology.recipe import Recipe
from offpath.topology.record import LayerState, LayerUpdate, TopologyUpdate
from offpath.topology.settings import whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Topology:
    """Changes the connections of the sparse layers of `model` as `recipe` says, and moves everything along with them.

    Call `step()` after `optimizer.step()`, and before `optimizer.zero_grad()`. Values, gradients and every state tensor
    of any torch optimizer go with their connection, bit for bit; grown connections begin with zero. Models in `also`
    (such as an `AveragedModel`) get the same connections. All draws come from a generator of its own, made from `seed`.

    Frozen layers, and those that `filter_fn(module, fqn)` declines, are left alone; sparse convolutions, which it also
    leaves alone, are warned of. `grown_state` gives other numbers
    than zero, or "mean" for that of the layer, to the optimizer's state of grown connections, by its key: for Adam,
    {"exp_avg_sq": "mean"} keeps their first steps from being several times the learning rate. `record_explored`
    remembers which positions have ever held a connection, for `survey()`: one bit for each position of the dense
    weights, here and in the state_dict. An error changes nothing.
    Raises `TopologyError` when the recipe cannot be carried out with this model and optimizer.

    In many processes of `torch.distributed`, each makes a topology, of its `DistributedDataParallel` or of the model in
    that; all decide alike, from gradients averaged over them, or raise. They are the processes of `process_group`, else
    those of the `DistributedDataParallel`, else all; a group of one process keeps to itself.

    >>> from offpath import SparseLinear, topology
    >>> model = nn.Sequential(SparseLinear(64, 32), nn.ReLU(), SparseLinear(32, 10))
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> schedule, budget = topology.Every(update_freq=2), topology.PerLayer(topology.Constant(0.3))
    >>> recipe = topology.Recipe("mine", schedule, topology.drop.magnitude, topology.grow.random, budget)
    >>> moving = topology.Topology(model, optimizer, recipe)
    >>> for _ in range(2):
    ...     model(torch.randn(8, 64)).square().sum().backward()
    ...     optimizer.step()
    ...     update = moving.step()
    ...     optimizer.zero_grad()
    >>> update.dropped, update.grown, model[0].nnz
    (72, 72, 205)
    >>> moving
    Topology(mine, step 2, 2 layers)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        recipe: Recipe,
        *,
        seed: int = 0,
        also: Sequence[nn.Module] = (),
        filter_fn: FilterFn | None = None,
        grown_state: Mapping[str, float | str] | None = None,
        process_group: ProcessGroup | None = None,
        record_explored: bool = False,
    ) -> None:
        self.recipe = recipe
        self._optimizer = optimizer
        self._grown_state = dict(grown_state or {})
        check_grown_state(self._grown_state)
        keeps_nnz = getattr(recipe.budget, "keeps_nnz", recipe.budget is None)
        check_optimizer(optimizer, keeps_nnz, moves=recipe.schedule is not None)
        self._model = unwrapped(model)
        self._managed = managed_layers(self._model, optimizer, also, filter_fn, record_explored)
        if recipe.schedule is not None:
            warn_of_staying(self._model, filter_fn)
        self._generator = torch.Generator().manual_seed(whole("seed", seed, "pass an int, such as 0"))
        self._step = 0
        if recipe.budget is not None:
            recipe.budget.check([managed.view(self._generator) for managed in self._managed])
        self._processes = Processes(model, process_group, self._sizes if keeps_nnz else None)
        self._check_processes()
        self._processes.follow(self._sizes)
        self._watch()

    def __repr__(self) -> str:
        return f"Topology({self.recipe.name}, step {self._step}, {len(self._managed)} layers)"

    @property
    def step_count(self) -> int:
        """Calls of `step()` so far."""
        return self._step

    @property
    def watching(self) -> bool:
        """Whether the next passes are watched for an update that reads dense gradients.

        A compiled model would not notice the hooks: run these passes under `torch.compiler.set_stance("force_eager")`.
        """
        schedule, steps = self.recipe.schedule, gradient_steps(self.recipe.grow)
        return schedule is not None and any(schedule.due(self._step + ahead) for ahead in range(1, steps + 1))

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers that are looked after."""
        return tuple(managed.name for managed in self._managed)

    def survey(self) -> tuple[LayerState, ...]:
        """Where each layer stands now, compared with when the topology was made; O(nnz)."""
        check_inside(self._model, self._managed)
        return tuple(managed.state() for managed in self._managed)

    def step(self) -> TopologyUpdate | None:
        """Count an optimizer step and, when an update is due, make it; returns what it did, or None.

        Raises `TopologyError` when it cannot be made. Then nothing has changed, the step is not counted, and what was
        seen of the gradients is forgotten.
        """
        schedule = self.recipe.schedule
        update = None
        if schedule is None or not schedule.due(self._step + 1):
            self._check_passes()
        else:
            drawn = self._generator.get_state()
            try:
                edits = self._agreed_edits()
            except BaseException:
                self._generator.set_state(drawn)
                self.forget()
                raise
            layers = tuple(self._apply(m, e) for m, e in zip(self._managed, edits, strict=True))
            self._processes.follow(self._sizes)
            update = TopologyUpdate(self._step + 1, layers)
        self._step += 1
        for managed in self._managed:
            if update is None:
                managed.capture.age(gradient_decay(self.recipe.grow))
            else:
                managed.capture.disarm()
        self._watch()
        return update

    def forget(self) -> None:
        """Forget what was seen of the gradients since the last step: for one that a gradient scaler skipped."""
        for managed in self._managed:
            managed.capture.clear()

    def close(self) -> None:
        """Watch no more passes, when training ends between the updates of a rule that reads the dense gradient."""
        for managed in self._managed:
            managed.capture.disarm()

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on to the same numbers, beside the model's and the optimizer's own.

        Plain numbers, strings and tensors; save it after `step()`, not between a backward pass and it. It is the same
        in all processes, but for a rule that reads the gradients of several steps: there, between two updates, each
        has to save and load its own.
        """
        return {
            "version": STATE_VERSION,
            "recipe": self.recipe.describe(),
            "step": self._step,
            "generator": self._generator.get_state(),
            "layers": {managed.name: managed.state_dict(self._processes.rank) for managed in self._managed},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Load the model's and the optimizer's checkpoint first.

        Raises `TopologyError`, before anything is changed, when it belongs to another recipe or another model, or is
        no whole state_dict of a topology.
        """
        check_state(state, self.recipe.describe(), self._managed, self._processes.rank)
        self._processes.follow(self._sizes)  # the model's checkpoint may have brought other ones
        for managed in self._managed:
            managed.load_state_dict(state["layers"][managed.name])
        self._generator.set_state(state["generator"].cpu())
        self._step = int(state["step"])
        self._watch()

    def _watch(self) -> None:
        """Watch the passes before an update that reads dense gradients, and no others."""
        for managed in self._managed:
            if self.watching:
                managed.capture.arm()
            else:
                managed.capture.disarm()

    @property
    def _sizes(self) -> list[int]:
        return [managed.layer.nnz for managed in self._managed]

    def _check_processes(self, **more: int) -> None:
        """Raise `TopologyError` in every process when they do not train the same."""
        if self._processes.count == 1:
            return
        self._processes.check_same(
            self._managed[0].layer.values.device,
            recipe_and_layers=fingerprint(
                self.recipe.describe(),
                [(m.name, m.layer.in_features, m.layer.out_features, m.frozen) for m in self._managed],
            ),
            steps=self._step,
            random_state=fingerprint(self._generator.get_state()),
            # Not the digest that the layer carries: a broadcast of rank 0 has written over it.
            connections=fingerprint([managed.layer.connections.digest() for managed in self._managed]),
            **more,
        )

    def _check_passes(self) -> None:
        problem = next((problem for managed in self._managed if (problem := managed.passes_problem())), None)
        if problem:
            self.forget()
            raise TopologyError(problem)

    def _agreed_edits(self) -> list[Edit | None]:
        """The edits of the update that is due: decided in every process alike, and compared before any is made."""
        recipe, processes, step = self.recipe, self._processes, self._step + 1
        if processes.count == 1:
            self._check_passes()
            layers = self._views()
            return self._edits(decide_growth(recipe, layers, decide_drops(recipe, step, layers)) if layers else [])
        device = self._managed[0].layer.values.device
        for managed in self._managed:
            check_plain(managed.name, managed.layer)
        self._check_processes(weights=fingerprint(*(managed.layer.values for managed in self._managed)))
        averages = needs_dense_gradient(recipe.grow)
        with processes.telling_failure(device):
            self._check_passes()
            layers = self._views()
        if not layers:  # in no process: which are frozen has been compared
            return self._edits([])
        if averages:
            processes.agree(device)
            layers = processes.with_all_passes(layers)
        with processes.telling_failure(device):
            drops = decide_drops(recipe, step, layers)
        if averages:
            # Growth is one long exchange between all processes: whoever cannot take part in it says so before.
            processes.agree(device, *(drop for drop, _ in drops))
            decisions = decide_growth(recipe, layers, drops)
        with processes.telling_failure(device):
            if not averages:
                decisions = decide_growth(recipe, layers, drops)
            edits = self._edits(decisions)
        processes.agree(device, *(part for decision in decisions for part in (decision.drop, decision.grow)))
        return edits

    def _views(self) -> list[LayerView]:
        """The layers that may change; those that are frozen keep their connections."""
        check_inside(self._model, self._managed)
        average = self._processes.average
        views = [managed.view(self._generator, average) for managed in self._managed if not managed.frozen]
        return with_unused(views, needs_dense_gradient(self.recipe.grow))

    def _edits(self, decisions: list[Decision]) -> list[Edit | None]:
        """The decisions as edits, all of them checked against layers and optimizer; None where nothing changes."""
        self._check_grown_keys()
        remaining = iter(decisions)
        return [None if m.frozen else m.edit(next(remaining), self._optimizer) for m in self._managed]

    def _check_grown_keys(self) -> None:
        """The optimizer makes its state in its first step, so its keys are not known before an update."""
        weights = [managed.layer.values for managed in self._managed]
        states = [(weight, state_entries(self._optimizer, weight)) for weight in weights]
        if any(entries for _, entries in states):
            moving = {
                key for weight, entries in states for key, entry in entries
                if isinstance(entry, Tensor) and entry.shape == weight.shape
            }  # fmt: skip
            check_grown_state(self._grown_state, moving)

    def _apply(self, managed: ManagedLayer, edit: Edit | None) -> LayerUpdate:
        layer = managed.layer
        dropped = grown = 0
        if edit is not None:
            carry_state(self._optimizer, layer.values, edit, self._grown_state)
            for one in (layer, *managed.copies):
                rewire(one, edit)
            managed.unmoved = edit.carry(managed.unmoved.to(layer.values.device), fill=False)
            managed.digest = managed.digest_now()
            if managed.explored:
                managed.explored.add(edit.pattern.positions()[edit.grown_slots])
            grown = edit.grown_slots.numel()
            dropped = edit.old_to_new.numel() - (layer.nnz - grown)
        size = layer.in_features * layer.out_features
        return LayerUpdate(managed.name, dropped, grown, layer.nnz, size, int(managed.unmoved.sum()))
