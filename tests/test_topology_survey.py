"""What `Topology.survey()` and the metrics say of connections, against masks that are kept by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import offpath
from offpath import SparseLinear
from offpath.studies import RunConfig
from offpath.studies.data import load
from offpath.studies.run import Run
from offpath.topology import TopologyError
from topology_checks import model_of, train_step


def _masks(model: torch.nn.Module) -> list[Tensor]:
    return [m.pattern.to_mask() for m in model.modules() if isinstance(m, SparseLinear)]


@pytest.mark.parametrize("method", ["set", "rigl", "gmp"])
def test_every_statistic_of_the_metrics_is_what_masks_say(method: str) -> None:
    config = RunConfig(data="digits", model="mlp-small", epochs=2, batch_size=64, sparsity=0.97, method=method, seed=2)
    run = Run(replace(config, update_freq=5, drop_fraction=0.6), load("digits"))
    masks = _masks(run.model)
    start, held, explored = ([m.clone() for m in masks] for _ in range(3))
    for _ in range(2):
        updates = dropped = grown = 0
        for _ in range(run.steps_per_epoch):
            run.advance()
            before, masks = masks, _masks(run.model)
            updates += any(not torch.equal(a, b) for a, b in zip(before, masks, strict=True))
            dropped += sum(int((a & ~b).sum()) for a, b in zip(before, masks, strict=True))
            grown += sum(int((b & ~a).sum()) for a, b in zip(before, masks, strict=True))
            held = [a & b for a, b in zip(held, masks, strict=True)]
            explored = [a | b for a, b in zip(explored, masks, strict=True)]
        record = run.finish_epoch()["topology"]
        assert (record["updates"], record["dropped"], record["grown"]) == (updates, dropped, grown)
        assert updates > 0 and (grown > 0) == (method != "gmp")
        size, nnz = (sum(map(count, masks)) for count in (Tensor.numel, lambda m: int(m.sum())))
        assert record["sparsity"] == 1 - nnz / size
        assert record["unmoved"] == sum(int(m.sum()) for m in held)
        assert record["moved_share"] == 1 - record["unmoved"] / nnz
        assert record["explored_share"] == sum(int(m.sum()) for m in explored) / size
        for layer, *of_layer in zip(record["layers"], start, masks, held, explored, strict=True):
            first, now, old, ever = (m.sum(1) for m in of_layer)
            assert layer["initial_nnz"] == int(first.sum()) and layer["size"] == of_layer[0].numel()
            assert layer["nnz"] == int(now.sum()) and layer["sparsity"] == 1 - layer["nnz"] / layer["size"]
            assert layer["unmoved"] == int(old.sum()) and layer["explored"] == int(ever.sum())
            assert layer["dead_units"] == int((now == 0).sum())
            assert layer["new_units"] == int(((now > 0) & (old == 0)).sum())


def test_explored_goes_through_a_state_dict_and_is_recorded_on_request_alone() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = offpath.SET(model, optimizer, update_freq=1, record_explored=True)
    ever = [m.clone() for m in _masks(model)]
    for step in range(1, 6):
        train_step(model, optimizer, step)
        topology.step()
        ever = [a | b for a, b in zip(ever, _masks(model), strict=True)]
    state = topology.state_dict()
    again = offpath.SET(model, optimizer, update_freq=1, record_explored=True)
    assert [layer.explored for layer in again.survey()] == [layer.nnz for layer in again.survey()]
    again.load_state_dict(state)
    assert [layer.explored for layer in again.survey()] == [int(m.sum()) for m in ever]
    plain = offpath.SET(model, optimizer, update_freq=1)
    assert [layer.explored for layer in plain.survey()] == [None, None]
    for one, other, recorded in ((plain, state, True), (again, plain.state_dict(), False)):
        with pytest.raises(TopologyError, match=f"record_explored={not recorded}, got one with {recorded}"):
            one.load_state_dict(other)


def test_a_filter_that_is_no_function_is_refused() -> None:
    model = model_of()
    with pytest.raises(ValueError, match=r"function of \(module, name\), got list"):
        offpath.SET(model, torch.optim.SGD(model.parameters(), lr=0.1), filter_fn=["0"])
