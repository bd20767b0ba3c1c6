"""A layer made from another kind, or a checkpoint of another shape, is refused: it would compute other numbers."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from offpath import SparseLinear
from offpath.nn import Int8Embedding, Int8SparseLinear, SparseConv1d, SparseConv2d, SparseSparseLinear


class ScaledEmbedding(nn.Embedding):
    """As in BART: rows that are multiplied after they are looked up."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 8


CONVERSIONS: dict[str, tuple[Callable[[], object], str]] = {
    "convolution to linear": (lambda: SparseLinear.from_dense(nn.Conv2d(4, 8, 1)), "nn.Linear, got Conv2d; SparseConv"),
    "embedding to linear": (lambda: SparseLinear.from_dense(nn.Embedding(4, 8)), "nn.Linear, got Embedding"),
    "dense to int8": (lambda: Int8SparseLinear.from_sparse(nn.Linear(4, 8)), "got Linear; SparseLinear.from_dense"),
    "convolution to int8": (lambda: Int8SparseLinear.from_sparse(SparseConv2d(4, 8, 3)), "got SparseConv2d"),
    "int8 to int8": (lambda: Int8SparseLinear.from_sparse(Int8SparseLinear(4, 8)), "got Int8SparseLinear"),
    "by input to int8": (lambda: Int8SparseLinear.from_sparse(SparseSparseLinear(4, 8)), "got SparseSparseLinear"),
    "convolution to by input": (
        lambda: SparseSparseLinear.from_sparse_linear(SparseConv1d(4, 8, 3)),
        "expected a SparseLinear, got SparseConv1d",
    ),
    "bag of embeddings": (lambda: Int8Embedding.from_dense(nn.EmbeddingBag(4, 8)), "got EmbeddingBag"),
    "scaled embedding": (
        lambda: Int8Embedding.from_dense(ScaledEmbedding(4, 8)),
        "got ScaledEmbedding, which does not",
    ),
    "linear to embedding": (lambda: Int8Embedding.from_dense(nn.Linear(4, 8)), "nn.Embedding, got Linear"),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_layers_of_other_kinds_are_refused(name: str) -> None:
    convert, message = CONVERSIONS[name]
    with pytest.raises(ValueError, match=message):
        convert()


@pytest.mark.parametrize(
    ("name", "given"),
    [("kernel_size", 3.0), ("kernel_size", None), ("stride", "2"), ("dilation", (1, 2, 3)), ("padding", 1.5)],
)
def test_sizes_that_are_no_numbers_are_named(name: str, given: object) -> None:
    with pytest.raises(ValueError, match=f"expected {name} as a number or 2 of at least"):
        SparseConv2d(4, 8, **{"kernel_size": 3, name: given})


@pytest.mark.parametrize("name", ["in_channels", "out_channels", "groups"])
def test_channels_that_are_no_numbers_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}='4'"):
        SparseConv2d(**{"in_channels": 4, "out_channels": 8, "groups": 1, "kernel_size": 3, name: "4"})


def test_numbers_of_numpy_are_numbers() -> None:
    layer = SparseConv2d(*np.array([4, 8]), np.int64(3), padding=np.int32(1), groups=np.int64(2))
    assert (layer.in_channels, layer.kernel_size, layer.padding, layer.groups) == (4, (3, 3), (1, 1), 2)
    assert all(type(size) is int for size in (layer.in_channels, layer.out_channels, layer.groups, *layer.kernel_size))
    assert SparseConv2d.from_dense(nn.Conv2d(4, 8, np.int64(3))).kernel_size == (3, 3)


OTHER_SHAPES = {
    "wider": (SparseLinear(8, 4), SparseLinear(16, 4)),
    "larger kernel": (SparseConv2d(4, 8, 3), SparseConv2d(4, 8, 5)),
    "other kernel of the same area": (SparseConv2d(4, 8, (1, 3)), SparseConv2d(4, 8, (3, 1))),
    "channels instead of a kernel": (SparseConv1d(4, 8, 3), SparseConv1d(12, 8, 1)),
    "more outputs by input": (SparseSparseLinear(8, 4), SparseSparseLinear(8, 16)),
    "wider int8": (Int8SparseLinear(8, 4), Int8SparseLinear(16, 4)),
}


@pytest.mark.parametrize("name", OTHER_SHAPES)
def test_a_checkpoint_of_another_shape_is_refused_where_torch_can_tell(name: str) -> None:
    file = io.BytesIO()
    saved, other = (nn.Sequential(layer) for layer in OTHER_SHAPES[name])
    torch.save(saved.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    with pytest.raises(RuntimeError, match="expected connections of a weight of shape"):
        other.load_state_dict(state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in other.state_dict().items())
    saved.load_state_dict(state)
    saved.load_state_dict(dict(state))  # without what torch keeps beside: as from safetensors


def test_the_way_from_a_dense_checkpoint_is_that_of_the_layer() -> None:
    dense = nn.Conv2d(4, 8, 3)
    with pytest.raises(RuntimeError, match=r"sparsify\(model, method='magnitude', modules=...\) or from_dense of the"):
        SparseConv2d(4, 8, 3).load_state_dict(dense.state_dict())
    with pytest.raises(RuntimeError, match=r"SparseLinear.from_dense and Int8SparseLinear.from_sparse"):
        Int8SparseLinear(4, 8).load_state_dict(nn.Linear(4, 8).state_dict())
