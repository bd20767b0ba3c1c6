"""A run on disk: one safetensors file that holds everything a run needs to go on.

Model, optimizer, topology, generator states and progress are in one file, so they can never belong to different steps.
Tensors: `model/<key>`, `optimizer/<parameter index>/<name>`, `topology/generator`, `topology/unmoved/<layer>`,
`topology/explored/<layer>`, `rng_state`. The header's metadata holds JSON under `offpath_run` (the format version, the
config, the progress, the plain numbers of optimizer and topology) and a `sha256` of all.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from offpath.studies.config import RunError
from offpath.studies.files import write_whole
from offpath.studies.resumable import Checkpointed
from offpath.topology import Topology, TopologyError

FORMAT_VERSION = 1
# What may differ when a run goes on: it can be given more epochs, and its data may have moved. A text is compared when
# it is read: checkpoints once did not tell it.
CHANGEABLE = {"epochs", "data_dir", "text_sha256"}
# What a topology's state holds of each layer in tensors.
LAYER_TENSORS = ("unmoved", "explored")


def save_checkpoint(run: Checkpointed, path: Path) -> None:
    """Write the whole state of `run` to `path`, atomically."""
    tensors = {f"model/{key}": value for key, value in run.model.state_dict().items()}
    tensors["rng_state"] = run.rng_state
    state = run.optimizer.state_dict()
    numbers: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    header: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "config": run.config.to_json(),
        "step": run.step,
        "meter": asdict(run.meter),
        "optimizer": {"param_groups": state["param_groups"], "numbers": numbers},
    }
    if run.topology:
        header["topology"] = _take_tensors(run.topology.state_dict(), tensors)
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    text = json.dumps(header)
    metadata = {"offpath_run": text, "sha256": _digest(text, contiguous)}
    # As bytes: `save_file` writes to a file of its own, which nobody would lock or sync, and renames that.
    write_whole(path, lambda file: file.write(to_bytes(contiguous, metadata)))


def load_checkpoint(run: Checkpointed, path: Path) -> None:
    """Put `run` where the checkpoint at `path` left off: read by the first process, and handed to the others.

    Raises `RunError` when the file is missing, corrupt, truncated, or belongs to another run.
    """
    tensors, header = run.ranks.from_first(lambda: _read(path))
    saved, current = type(run.config).from_json(header["config"]).to_json(), run.config.to_json()
    differing = [key for key in saved if key not in CHANGEABLE and saved[key] != current[key]]
    if differing:
        key = differing[0]
        raise RunError(f"expected a checkpoint of this run, but {path} has {key}={saved[key]!r}, not {current[key]!r}")
    run.model.load_state_dict({key.removeprefix("model/"): t for key, t in tensors.items() if key.startswith("model/")})
    run.optimizer.load_state_dict(_optimizer_state(tensors, header["optimizer"]))
    if run.topology and "topology" in header:  # runs of fixed connections once had none
        _load_topology(run.topology, tensors, header["topology"], path)
    run.rng_state = tensors["rng_state"]
    run.step = header["step"]
    run.meter = type(run.meter)(**header["meter"])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.exists():
        raise RunError(f"expected a checkpoint at {path}, found none; start the run without --resume")
    try:
        with safe_open(path, framework="pt") as file:
            mapped = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = file.metadata() or {}
            text = metadata["offpath_run"]
            # Of what lies in the file: a copy of booleans makes 1 of any byte but 0.
            if metadata["sha256"] != _digest(text, mapped):
                raise ValueError("its checksum does not match its contents")
            # The optimizer would update the mapped file in place.
            tensors = {key: tensor.clone() for key, tensor in mapped.items()}
        header = json.loads(text)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise RunError(
            f"expected a whole offpath checkpoint at {path}, got a corrupt or foreign file ({error}); "
            "restore it from a copy, or start again with another --out"
        ) from error
    if header["version"] != FORMAT_VERSION:
        raise RunError(
            f"expected checkpoint format {FORMAT_VERSION}, got {header['version']} in {path}; "
            "go on with the version of offpath that wrote it"
        )
    return tensors, header


def _digest(header: str, tensors: dict[str, Tensor]) -> str:
    """sha256 of everything that counts: safetensors itself would not notice a flipped bit in a weight."""
    digest = hashlib.sha256(header.encode())
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _take_tensors(state: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Put the tensors of a topology's state into `tensors`, and return the rest."""
    tensors["topology/generator"] = state["generator"]
    for name, layer in state["layers"].items():
        tensors |= {f"topology/{key}/{name}": layer[key] for key in LAYER_TENSORS}
    layers = {n: {k: v for k, v in layer.items() if k not in LAYER_TENSORS} for n, layer in state["layers"].items()}
    return {key: value for key, value in state.items() if key != "generator"} | {"layers": layers}


def _load_topology(topology: Topology, tensors: dict[str, Tensor], header: dict[str, Any], path: Path) -> None:
    layers = {
        name: layer | {key: t for key in LAYER_TENSORS if (t := tensors.get(f"topology/{key}/{name}")) is not None}
        for name, layer in header["layers"].items()
    }
    try:
        topology.load_state_dict(header | {"generator": tensors["topology/generator"], "layers": layers})
    except TopologyError as error:
        raise RunError(f"expected a checkpoint of this run's topology in {path}: {error}") from error


def _optimizer_state(tensors: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in header["numbers"].items()}
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/", 2)
            state.setdefault(int(index), {})[name] = tensor
    return {"state": state, "param_groups": header["param_groups"]}
