"""`sparsify`, `densify` and topologies with convolutions: where they are asked for, and told of where not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from offpath import SparseLinear, densify, sparsify, topology
from offpath.nn import SparseConv1d, SparseConv2d, SparseSparseLinear

BOTH = (nn.Linear, nn.Conv2d)
IMAGES = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, padding="same", dilation=2, bias=False),
        nn.Flatten(),
        nn.Linear(100, 10),
    )


def test_convolutions_stay_dense_by_default_and_the_report_says_so() -> None:
    model = _model()
    report = sparsify(model, 0.9)
    assert [layer.name for layer in report.layers] == ["4"] and type(model[0]) is nn.Conv2d
    reason = "it is a Conv2d; name nn.Conv2d in modules= to make it sparse"
    assert report.skipped == (("0", reason), ("2", reason))
    assert sparsify(_model(), 0.9, filter_fn=lambda module, name: module.out_features == 10).skipped == ()


@pytest.mark.parametrize("method", ["random", "magnitude"])
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_convolutions_become_sparse_where_asked_for(method: str, distribution: str) -> None:
    model, dense = _model(), _model()
    report = sparsify(model, 0.75, distribution, method=method, seed=0, modules=BOTH)
    assert [layer.shape for layer in report.layers] == [(8, 18), (4, 72), (10, 100)]
    assert abs(report.nnz - 0.25 * (8 * 18 + 4 * 72 + 10 * 100)) <= 2
    assert [type(layer) for layer in model] == [SparseConv2d, nn.ReLU, SparseConv2d, nn.Flatten, SparseLinear]
    assert torch.equal(model[0].bias, dense[0].bias) and model[2].bias is None
    assert (model[0].stride, model[0].groups, model[2].padding, model[2].dilation) == ((2, 2), 2, "same", (2, 2))
    again = _model()
    sparsify(again, 0.75, distribution, method=method, seed=0, modules=BOTH)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    if method == "magnitude":
        kept = model[0].to_dense().weight
        assert torch.equal(kept[kept != 0], dense[0].weight[kept != 0])
        assert kept[kept != 0].abs().min() >= dense[0].weight[kept == 0].abs().max()


def test_there_and_back_again() -> None:
    model, dense = _model(), _model()
    sparsify(model, 0.0, method="magnitude", modules=BOTH)
    report = densify(model)
    assert [layer.shape for layer in report.layers] == [(8, 18), (4, 72), (10, 100)]
    assert [type(layer) for layer in model] == [type(layer) for layer in dense]
    assert torch.equal(model(IMAGES), dense(IMAGES))


def test_one_dimension() -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 5))
    sparsify(model, 0.5, modules=[nn.Conv1d], filter_fn=lambda module, name: module.kernel_size == (5,))
    assert type(model[0]) is SparseConv1d and model[0].nnz == 80


def test_what_cannot_be_converted_is_told() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), SparseSparseLinear(4, 4))
    assert "it pads with 'circular'" in sparsify(model, 0.5, modules=BOTH).skipped[0][1]
    assert densify(model).skipped == (("1", "it is a SparseSparseLinear; make a SparseLinear of it first"),)
    with pytest.raises(ValueError, match=r"modules among nn.Linear, nn.Conv1d, nn.Conv2d, got <class .*Embedding"):
        sparsify(model, 0.5, modules=(nn.Embedding,))
    with pytest.raises(ValueError, match=r"got a Conv2d itself; use .*from_dense"):
        sparsify(nn.Conv2d(4, 8, 3), 0.5)
    for layer in (SparseConv2d(4, 8, 3), SparseSparseLinear(4, 4)):
        with pytest.raises(ValueError, match=f"got a {type(layer).__name__} itself; use its to_dense"):
            densify(layer)


def test_a_topology_says_that_the_connections_of_convolutions_stay() -> None:
    model = nn.Sequential(SparseConv2d(4, 8, 3), nn.Flatten(), SparseLinear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"connections of '0' \(SparseConv2d\) stay as they are"):
        moving = topology.SET(model, optimizer, update_freq=1)
    columns = model[0].col_indices
    assert moving.step() is not None and torch.equal(model[0].col_indices, columns)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        topology.RigL(model, optimizer, end_step=1000, filter_fn=lambda module, name: name != "0")
        topology.Static(model, optimizer)
    alone = nn.Sequential(copy.deepcopy(model[0]))
    with pytest.raises(topology.TopologyError, match=r"connections of '0' \(SparseConv2d\) cannot be moved"):
        topology.GMP(alone, torch.optim.SGD(alone.parameters(), 0.1), final_sparsity=0.5, end_step=10)
