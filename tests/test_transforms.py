"""Derivatives of derivatives, and `torch.func`: per-sample gradients, Jacobians, ensembles, batches of gradients.

Of whole numbers in float64, whose sums are exact in any order: results are compared bit for bit.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, grad, jacrev, stack_module_state, vjp, vmap

import offpath
from offpath import SparseLinear
from offpath.kernels import Backend
from offpath.nn import SparseAutoencoder, SparseConv2d
from offpath.ops import sparse_linear
from problems import PROBLEMS, gaussian

SMALL = [p for p in PROBLEMS if p.name in ("one connection", "no connections", "rows of one to eight connections")]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_word_of_a_missing_rule() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "There is a performance drop")
        yield


@pytest.mark.parametrize("wanted", ["x", "values", "bias", "x values", "x values bias"])
@pytest.mark.parametrize("problem", SMALL, ids=lambda p: p.name)
def test_second_derivatives(backend: Backend, problem: Any, wanted: str) -> None:
    pattern, draw = problem.pattern, gaussian(11, torch.float64)
    shapes = {"x": (problem.batch, pattern.shape[1]), "values": (pattern.nnz,), "bias": (pattern.shape[0],)}
    operands = [draw(shape).requires_grad_(name in wanted.split()) for name, shape in shapes.items()]
    # A square, or the second derivatives of one operand alone would be zero.
    assert gradgradcheck(lambda *a: sparse_linear(*a, pattern.crow_indices, pattern.col_indices).square(), operands)


def _whole(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).double()


def pair() -> tuple[SparseLinear, nn.Linear]:
    layer = SparseLinear(6, 5, sparsity=0.5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        layer.values.copy_(_whole(layer.nnz))
        layer.bias.copy_(_whole(5, seed=1))
    twin = nn.Sequential(copy.deepcopy(layer))
    offpath.densify(twin)
    return layer, twin[0]


X = _whole(3, 6, seed=2)
OF_X: dict[str, Callable[[nn.Module], Tensor]] = {
    "vmap": lambda layer: vmap(layer)(X),
    "vmap of another dimension": lambda layer: vmap(layer, in_dims=1, out_dims=1)(_whole(6, 3, 6)),
    "vmap without gradients": lambda layer: torch.no_grad()(vmap(layer))(X),
    "vmap of vmap": lambda layer: vmap(vmap(layer))(_whole(2, 3, 6)),
    "grad": lambda layer: grad(lambda x: layer(x).square().sum())(X),
    "grad of grad": lambda layer: grad(lambda y: grad(lambda x: layer(x).pow(3).sum())(y).sum())(X),
    "jacrev": lambda layer: jacrev(layer)(X),
    "jacrev of jacrev": lambda layer: jacrev(jacrev(lambda x: layer(x).pow(3).sum()))(X),
    "vjp": lambda layer: vjp(layer, X)[1](_whole(3, 5))[0],
    "gradients of samples": lambda layer: vmap(grad(lambda x: layer(x).square().sum()))(X),
    "jacobian": lambda layer: jacobian(layer, X, vectorize=True),
    "hessian": lambda layer: hessian(lambda x: layer(x).pow(3).sum(), X),
    "gradient through vmap": lambda layer: _gradient(lambda x: vmap(layer)(x).square().sum()),
    "penalty of a gradient": lambda layer: _gradient(lambda x: _gradient(lambda y: layer(y).pow(3).sum(), x).square()),
}


def _gradient(f: Callable[[Tensor], Tensor], x: Tensor | None = None) -> Tensor:
    x = X.clone().requires_grad_() if x is None else x
    return torch.autograd.grad(f(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("compute", OF_X)
def test_transforms_of_the_input_are_those_of_the_dense_layer(compute: str) -> None:
    sparse, dense = (OF_X[compute](layer) for layer in pair())
    assert bool(sparse.any()) and torch.equal(sparse, dense)


def test_what_outlives_its_transform_is_what_it_was() -> None:
    layer, x, left = SparseLinear(8, 4, sparsity=0.5), torch.randn(3, 8), []

    def keeping(a: Tensor) -> Tensor:
        left.append(a)
        return a.sum()

    grad(keeping)(x)
    got = torch.autograd.grad(layer(left[0]).sum(), layer.values)[0]
    assert torch.equal(got, torch.autograd.grad(layer(x).sum(), layer.values)[0])


def test_images_that_lie_across_a_batch_have_their_gradients() -> None:
    torch.manual_seed(0)
    layer, x = SparseConv2d(2, 3, 3, sparsity=0.5, dtype=torch.float64), torch.randn(2, 4, 2, 5, 5).double()
    for dim, images in ((1, x), (-1, x.movedim(1, -1))):
        one, other = (images.clone().requires_grad_() for _ in range(2))
        vmap(layer, in_dims=dim)(one).square().sum().backward()
        torch.stack([layer(image) for image in other.unbind(dim)]).square().sum().backward()
        assert torch.equal(one.grad, other.grad)


def test_gradients_of_each_sample_are_those_of_the_dense_layer() -> None:
    layer, dense = pair()

    def gradients(layer: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(layer, parameters, (x,)).square().sum()

        parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
        return vmap(grad(loss), in_dims=(None, 0))(parameters, X)

    sparse, expected = gradients(layer), gradients(dense)
    assert torch.equal(sparse["bias"], expected["bias"])
    rows, columns = (layer.pattern.row_indices().long(), layer.pattern.col_indices.long())
    assert torch.equal(sparse["values"], expected["weight"][:, rows, columns])


def test_an_ensemble_of_one_pattern_is_its_members() -> None:
    layers = [pair()[0] for _ in range(3)]
    for number, layer in enumerate(layers):
        layer.values.data.add_(number)
    parameters, buffers = stack_module_state(layers)
    together = vmap(lambda p, b: functional_call(layers[0], (p, b), (X,)))(parameters, buffers)
    assert torch.equal(together, torch.stack([layer(X) for layer in layers]))


def test_an_ensemble_of_other_patterns_is_refused() -> None:
    layers = [SparseLinear(6, 5, sparsity=0.5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    parameters, buffers = stack_module_state(layers)
    with pytest.raises(RuntimeError, match="the topologies differ"):
        vmap(lambda p, b: functional_call(layers[0], (p, b), (X.float(),)))(parameters, buffers)


OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: SparseConv2d(2, 3, 3, sparsity=0.5, dtype=torch.float64), (3, 2, 5, 5)),
    "autoencoder": (lambda: SparseAutoencoder(6, 16, k=3, dtype=torch.float64), (3, 6)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_layers_transform_to_what_autograd_gives(kind: str) -> None:
    make, shape = OTHERS[kind]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape, dtype=torch.float64)

    def compute(x: Tensor) -> Tensor:
        output = layer(x)
        return output if isinstance(output, Tensor) else output[0]

    def of_one(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        output = functional_call(layer, parameters, (x[None],))
        return (output if isinstance(output, Tensor) else output[0]).square().sum()

    one_by_one = jacobian(compute, x)
    assert torch.equal(jacrev(compute)(x), one_by_one)
    assert torch.equal(jacobian(compute, x, vectorize=True), one_by_one)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    together = vmap(grad(of_one), in_dims=(None, 0))(parameters, x)
    for place in range(len(x)):
        alone = torch.autograd.grad(of_one(dict(layer.named_parameters()), x[place]), list(layer.parameters()))
        for gradient, name in zip(alone, parameters, strict=True):
            assert torch.equal(together[name][place], gradient)
