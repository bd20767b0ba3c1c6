"""The layers that are measured: their operands, their right results, and every way to compute them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.functional import linear

from offpath.cost.bounds import Expected, expected
from offpath.cost.crossover import DENSE, OFFPATH, TORCH_SPARSE, Contender
from offpath.kernels import KernelError
from offpath.nn import SparseLinear
from offpath.pattern import Pattern
from offpath.studies.crossover.on_gpu import (
    captured,
    copies_for,
    in_tf32,
    in_turns,
    offers_two_of_four,
    two_of_four,
)

CPU = torch.device("cpu")
# What torch raises for a layout or dtype that it has no kernel for.
TORCH_REFUSES = (RuntimeError,)
# A float64 product takes longer than all that is timed: of a larger layer, so many features are checked.
CHECKED_FEATURES = 1024
# The first and the last are always among them: kernels go wrong at the edges.
CHECKED_AT_EACH_END = 32


class Layers:
    """One matrix in one dtype as a `SparseLinear`, the equal `nn.Linear`, and torch's own CSR tensor."""

    def __init__(
        self, pattern: Pattern, dtype: torch.dtype, generator: torch.Generator, device: torch.device = CPU
    ) -> None:
        out_features, in_features = pattern.shape
        self.device, self.on_gpu, self.pattern = device, device.type == "cuda", pattern.to(device)
        self.sparse = SparseLinear(
            in_features, out_features, True, device, dtype, pattern=self.pattern, generator=generator
        )
        self._write_out()
        self.rows = _checked(out_features, generator).to(device)
        self.columns = _checked(in_features, generator).to(device)
        self.row_terms = self.pattern.row_counts
        self.column_terms = torch.bincount(self.pattern.col_indices, minlength=in_features)

    def _write_out(self) -> None:
        pattern, self.dense = self.pattern, self.sparse.to_dense()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            values = self.sparse.values.detach().clone()
            # A pattern is canonical; to leave the check unsaid makes torch warn about it.
            self.csr = torch.sparse_csr_tensor(
                pattern.crow_indices, pattern.col_indices, values, pattern.shape, check_invariants=False
            )
        self.weight = self.dense.weight.detach()
        assert self.dense.bias is not None
        self.bias = self.dense.bias.detach()

    def copy(self) -> Layers:
        """The same numbers in memory of their own."""
        other = copy.copy(self)
        other.sparse = copy.deepcopy(self.sparse)
        other._write_out()
        return other

    @cached_property
    def replicas(self) -> list[Layers]:
        """So many copies that the first one is in no cache of the GPU any more when the last one has been read."""
        return [self.copy() for _ in range(copies_for(self.weight.nbytes))]

    @cached_property
    def slots(self) -> tuple[Tensor, Tensor]:
        """The connections of the checked rows, and their positions in the matrix of these rows."""
        numbers = torch.arange(len(self.rows), device=self.device)
        place = numbers.new_full((self.pattern.shape[0],), -1).index_put((self.rows,), numbers)
        place_of_slot = place[self.pattern.row_indices().long()]
        slots = (place_of_slot >= 0).nonzero().squeeze(1)
        return slots, place_of_slot[slots] * self.pattern.shape[1] + self.pattern.col_indices[slots]


class Workload:
    """Layers at one batch, with a Gaussian input and output gradient, contiguous and token-major as users have them."""

    def __init__(self, layers: Layers, batch: int, generator: torch.Generator) -> None:
        self.layers = layers
        out_features, in_features = layers.pattern.shape
        dtype = layers.weight.dtype
        self.batch_terms = torch.tensor(batch, device=layers.device)
        self.x = torch.randn(batch, in_features, generator=generator).to(layers.device, dtype)
        self.dy = torch.randn(batch, out_features, generator=generator).to(layers.device, dtype)

    def contenders(self, product: str) -> list[Contender]:
        """Every way to compute `product`; the dense one first."""
        ways = self._ways(product)
        if not self.layers.on_gpu:
            return ways
        copies = [self._with(layers)._ways(product) for layers in self.layers.replicas]
        return [
            replace(way, repeated=partial(in_turns if way.only_for_reference else captured, [c[i].run for c in copies]))
            for i, way in enumerate(ways)
        ]

    def _with(self, layers: Layers) -> Workload:
        other = copy.copy(self)  # with the right results, where they have been computed
        other.layers = layers
        return other

    def _ways(self, product: str) -> list[Contender]:
        of = {"forward": self._forward, "dx": self._dx, "dweight": self._dweight, "step": self._step}
        ways = of[product]()
        return [*ways, in_tf32(ways[0])] if self.layers.on_gpu and self.x.dtype is torch.float32 else ways

    def _forward(self) -> list[Contender]:
        layers, x, right = self.layers, self.x, (self._y,)

        def inference(layer: Callable[[Tensor], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
            return _without_grad(lambda: (layer(x),))

        def csr_times_x(x: Tensor) -> Tensor:
            return torch.addmm(layers.bias[:, None], layers.csr, x.t()).t().contiguous()

        ways = [
            Contender(DENSE, "nn.Linear", inference(layers.dense), right),
            Contender(OFFPATH, "SparseLinear", inference(layers.sparse), right, (KernelError,)),
            _reference("csr @ x.T", inference(csr_times_x), right),
            _reference("linear(x, csr)", inference(lambda x: linear(x, layers.csr, layers.bias)), right),
        ]
        if offers_two_of_four(layers.weight, layers.pattern.sparsity):
            ways.append(two_of_four(layers.weight, layers.bias, x))
        return ways

    def _dx(self) -> list[Contender]:
        layers, dy, right = self.layers, self.dy, (self._dx_right,)
        sparse, values, owned = layers.sparse, layers.sparse.values.detach(), layers.sparse.connections
        op = torch.ops.offpath.sparse_linear_dx

        def dense() -> tuple[Tensor]:
            return (dy @ layers.weight,)

        def offpath() -> tuple[Tensor]:
            return (op(dy, values, owned.crow_indices, owned.col_indices, sparse.in_features),)

        return [
            Contender(DENSE, "dy @ W", _without_grad(dense), right),
            Contender(OFFPATH, "sparse_linear_dx", _without_grad(offpath), right, (KernelError,)),
        ]

    def _dweight(self) -> list[Contender]:
        owned, x, dy = self.layers.sparse.connections, self.x, self.dy
        op = torch.ops.offpath.sparse_linear_dvalues

        def dense() -> tuple[Tensor]:
            return (dy.t() @ x,)

        def offpath() -> tuple[Tensor]:
            return (op(dy, x, owned.crow_indices, owned.col_indices),)

        return [
            Contender(DENSE, "dy.T @ x", _without_grad(dense), (self._dweight_right,)),
            Contender(OFFPATH, "sparse_linear_dvalues", _without_grad(offpath), (self._dvalues_right,), (KernelError,)),
        ]

    def _step(self) -> list[Contender]:
        layers, dense, sparse = self.layers, self.layers.dense, self.layers.sparse
        x, dy = self.x.clone().requires_grad_(), self.dy
        csr, bias = layers.csr.detach().requires_grad_(), layers.bias.clone().requires_grad_()

        def step(layer: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor) -> Callable[[], tuple[Tensor, ...]]:
            def run() -> tuple[Tensor, ...]:
                x.grad = weight.grad = bias.grad = None
                # An optimizer has moved the weights since the last step: nothing made of them may be kept.
                increment_version(weight)
                y = layer(x)
                y.backward(dy)
                assert x.grad is not None and weight.grad is not None and bias.grad is not None
                gradient = weight.grad if weight.grad.layout is torch.strided else weight.grad.values()
                return y.detach(), x.grad, gradient, bias.grad

            return run

        assert sparse.bias is not None
        y, dx, dbias = self._y, self._dx_right, self._dbias_right
        of_values = (y, dx, self._dvalues_right, dbias)
        return [
            Contender(DENSE, "nn.Linear", step(dense, dense.weight, dense.bias), (y, dx, self._dweight_right, dbias)),
            Contender(OFFPATH, "SparseLinear", step(sparse, sparse.values, sparse.bias), of_values, (KernelError,)),
            _reference(
                "sparse.mm(csr, x.T)",
                # torch.sparse.mm alone gives the weight a sparse gradient; the other ways build the dense one.
                step(lambda x: (torch.sparse.mm(csr, x.t()) + bias[:, None]).t().contiguous(), csr, bias),
                of_values,
            ),
        ]

    @cached_property
    def _y(self) -> Expected:
        layers, x, rows = self.layers, self.x, self.layers.rows
        weight, bias = layers.weight[rows], layers.bias[rows]
        exact = linear(x.double(), weight.double(), bias.double())
        size = linear(x.float().abs(), weight.float().abs(), bias.float().abs())
        right = expected(exact, size, layers.row_terms[rows], x.dtype)
        return replace(right, index=(slice(None), rows), shape=self.dy.shape)

    @cached_property
    def _dx_right(self) -> Expected:
        layers, dy, columns = self.layers, self.dy, self.layers.columns
        weight = layers.weight[:, columns]
        size = dy.float().abs() @ weight.float().abs()
        right = expected(dy.double() @ weight.double(), size, layers.column_terms[columns], dy.dtype)
        return replace(right, index=(slice(None), columns), shape=self.x.shape)

    @cached_property
    def _dweight_right(self) -> Expected:
        rows, x = self.layers.rows, self.x
        dy = self.dy[:, rows]
        right = expected(
            dy.double().t() @ x.double(), dy.float().abs().t() @ x.float().abs(), self.batch_terms, x.dtype
        )
        return replace(right, index=(rows,), shape=self.layers.pattern.shape)

    @cached_property
    def _dvalues_right(self) -> Expected:
        right, (slots, positions) = self._dweight_right, self.layers.slots
        assert right.size is not None
        exact, bound, size = (known.view(-1)[positions] for known in (right.exact, right.bound, right.size))
        return Expected(exact, bound, index=(slots,), shape=(self.layers.pattern.nnz,), size=size)

    @cached_property
    def _dbias_right(self) -> Expected:
        return expected(self.dy.double().sum(0), self.dy.float().abs().sum(0), self.batch_terms, self.dy.dtype)


def _checked(features: int, generator: torch.Generator) -> Tensor:
    """All features of a small layer, a random part of a large one's; ascending."""
    if features <= CHECKED_FEATURES:
        return torch.arange(features)
    inner = CHECKED_AT_EACH_END + torch.randperm(features - 2 * CHECKED_AT_EACH_END, generator=generator)
    ends = torch.arange(CHECKED_AT_EACH_END)
    chosen = inner[: CHECKED_FEATURES - 2 * CHECKED_AT_EACH_END]
    return torch.cat([ends, chosen.sort().values, features - CHECKED_AT_EACH_END + ends])


def _without_grad(run: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """As inference and autograd's own backward pass call it."""
    return torch.no_grad()(run)


def _reference(way: str, run: Callable[[], tuple[Tensor, ...]], right: tuple[Expected, ...]) -> Contender:
    return Contender(TORCH_SPARSE, way, run, right, TORCH_REFUSES, only_for_reference=True)
