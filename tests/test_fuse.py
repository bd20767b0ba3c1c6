"""Layers that hand their activations to one another untransposed."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn

from offpath import SparseLinear, fuse
from offpath.convert.fuse import ELEMENTWISE
from offpath.ops import forced_methods


def _mlp(seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    sizes = (40, 64, 50, 30)
    layers = [SparseLinear(i, o, sparsity=0.5, generator=generator) for i, o in pairwise(sizes)]
    return nn.Sequential(layers[0], nn.ReLU(), nn.Dropout(0.0), layers[1], layers[2])


def _step(model: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def test_only_layers_that_feed_sparse_layers_are_fused() -> None:
    model = nn.Sequential(
        SparseLinear(8, 8), nn.ReLU(), SparseLinear(8, 8), nn.Linear(8, 8), SparseLinear(8, 8), nn.LayerNorm(8),
        SparseLinear(8, 8),
    )  # fmt: skip
    assert fuse(model) == ["0"]
    assert [m.feature_major for m in model if isinstance(m, SparseLinear)] == [True, False, False, False]


def test_a_layer_at_several_places_is_left_alone() -> None:
    shared = SparseLinear(8, 8)
    assert fuse(nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), SparseLinear(8, 8))) == []


def test_numbers_are_the_same_to_the_last_bit_and_activations_are_strided_views() -> None:
    plain, fused = _mlp(), _mlp()
    assert fuse(fused) == ["0", "3"]
    seen: list[Tensor] = []
    fused[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for batch in (1, 5, 70):
        x, dy = torch.randn(batch, 40), torch.randn(batch, 30)
        with forced_methods(forward="bucketed", dx="bucketed", dvalues="tiled"):
            expected, result = _step(plain, x, dy), _step(fused, x, dy)
        assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))
        assert seen[-1].t().is_contiguous()
        assert result[0].is_contiguous() and result[1].is_contiguous()
        for model in (plain, fused):
            model.zero_grad()


def test_other_methods_and_more_dimensions_give_what_they_give_unfused() -> None:
    plain, fused = _mlp(), _mlp()
    fuse(fused)
    for method, gradient in (("row-wise", "row-wise"), ("bitmap", "bitmap"), ("dense", "dense")):
        with forced_methods(forward=method, dx=method, dvalues=gradient):
            x = torch.randn(6, 40)
            assert torch.equal(plain(x), fused(x))
    with forced_methods(forward="bucketed"):
        x = torch.randn(2, 3, 40)
        assert torch.equal(plain(x), fused(x)) and fused(x).is_contiguous()


def test_compiled_and_copied_models_stay_right() -> None:
    plain, fused = _mlp(), _mlp()
    fuse(fused)
    x, dy = torch.randn(9, 40), torch.randn(9, 30)
    with forced_methods(forward="bucketed", dx="bucketed", dvalues="tiled"):
        expected = _step(plain, x, dy)
        for model in (copy.deepcopy(fused), torch.compile(copy.deepcopy(fused), fullgraph=True)):
            result = _step(model, x, dy)
            for a, b in zip(expected, result, strict=True):
                torch.testing.assert_close(a, b)


def test_every_elementwise_module_keeps_strides() -> None:
    x = torch.randn(7, 5).t().contiguous().t()
    for kind in ELEMENTWISE:
        y = kind()(x)
        assert y.stride() == x.stride(), kind
        x_grad = torch.randn(5, 7).t().requires_grad_()
        (gradient,) = torch.autograd.grad(kind()(x_grad), x_grad, torch.randn(5, 7).t())
        assert gradient.stride() == x_grad.stride(), kind
