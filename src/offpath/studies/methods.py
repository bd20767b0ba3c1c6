"""How the connections of a run change: a config's method as a topology, and what the metrics say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch import nn
from torch.optim import Optimizer

from offpath.studies.config import RunConfig, RunError
from offpath.topology import GMP, MEST, SET, RigL, Static, Topology, TopologyError

# Evci et al., 2020: connections that came later than this would have no time to learn.
MOVING_SHARE = 0.75


def end_of_updates(total_steps: int) -> int:
    """The `end_step` of a run of `total_steps` that names none.

    >>> end_of_updates(1000)
    750
    """
    return max(1, int(MOVING_SHARE * total_steps))


def make_topology(config: RunConfig, model: nn.Module, optimizer: Optimizer) -> Topology | None:
    """The topology that `config` asks for, which names an `end_step`; None for the dense model.

    Raises `RunError` when it could never move a connection, or when the layers do not allow it.
    """
    if config.sparsity == 0:
        return None
    if not config.moves:
        return Static(model, optimizer, seed=config.seed, record_explored=True)
    assert config.end_step is not None
    if config.method != "gmp" and config.update_freq >= config.end_step:  # gmp has an update at its end
        raise RunError(
            f"expected an update of the connections before step {config.end_step}, three quarters of the run, but "
            f"there is one every {config.update_freq} steps; lower --update-freq or raise --epochs"
        )
    common: dict[str, Any] = {
        "update_freq": config.update_freq,
        "end_step": config.end_step,
        "seed": config.seed,
        "record_explored": True,
    }
    try:
        if config.method == "gmp":
            return GMP(model, optimizer, final_sparsity=config.sparsity, distribution=config.distribution, **common)
        recipes: dict[str, Callable[..., Topology]] = {"set": SET, "rigl": RigL, "mest": MEST}
        return recipes[config.method](model, optimizer, drop_fraction=config.drop_fraction, **common)
    except TopologyError as error:
        raise RunError(str(error)) from error


def topology_record(topology: Topology) -> dict[str, Any]:
    """The state of the connections as it stands in the metrics: of all sparse layers together, and of each."""
    layers = topology.survey()
    nnz, size = (sum(getattr(layer, name) for layer in layers) for name in ("nnz", "size"))
    return {
        "sparsity": 1 - nnz / size,
        "unmoved": sum(layer.unmoved for layer in layers),
        "explored_share": sum(layer.explored or 0 for layer in layers) / size,
        "moved_share": 1 - sum(layer.unmoved for layer in layers) / max(nnz, 1),
        "layers": [asdict(layer) | {"sparsity": layer.sparsity} for layer in layers],
    }
