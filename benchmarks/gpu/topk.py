"""Times of a top-k decoder, forward and backward: 64 live latents of 131,072, as in a sparse autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from gpu.check import sums
from gpu.draws import numbers, topk_rows
from gpu.jobs import Job, Raced, Sides, Wanted, require
from gpu.rivals import sparsify_kernels
from gpu.timing import Call, Effort
from offpath.cost.bounds import Expected
from offpath.kernels import reference_rows
from offpath.kernels.gpu import counting_sort, gather
from verdicts import Figure

SECTION = "Top-k decoder"
DENSE, EMBEDDING_BAG, SPARSIFY, OURS = "dense bf16", "F.embedding_bag", "eai-sparsify", "offpath"
OVER_DENSE, OVER_BAG, OVER_SPARSIFY = "over dense", "over F.embedding_bag", "over eai-sparsify"
FORWARD_BAR, BACKWARD_BAR, SPARSIFY_BAR = 7.0, 9.0, 1.2  # of issue 7, for an H200 and the first size
Size = tuple[int, int, int, int]  # latents, k, width, tokens
SIZES: tuple[Size, ...] = ((131072, 64, 4096, 4096), (65536, 64, 4096, 4096), (16384, 32, 4096, 4096))
QUICK_SIZES: tuple[Size, ...] = ((8192, 32, 1024, 512),)
CHECKED = 48  # rows that are compared with float64


@dataclass(frozen=True)
class Decoder:
    """The operands of one size; the dense ones hold the same numbers."""

    size: Size
    crow_indices: Tensor
    indices: Tensor
    values: Tensor
    weight: Tensor
    dy: Tensor

    @property
    def activations(self) -> Tensor:
        latents, k, _, tokens = self.size
        places = self.indices.view(tokens, k).long()
        return self.values.new_zeros(tokens, latents).scatter_(1, places, self.values.view(tokens, k))


def jobs(quick: bool, effort: Effort, device: torch.device) -> Iterator[Job]:
    for size in QUICK_SIZES if quick else SIZES:
        latents, k, width, tokens = size
        name = f"{latents} latents, k={k}, width {width}, {tokens} tokens"
        barred = size == SIZES[0]
        for direction, bar, kernels, measure in (
            ("forward", FORWARD_BAR, ("gather_sum",), _forward),
            ("backward", BACKWARD_BAR, ("row_gradients",), _backward),
        ):
            bars = {OVER_DENSE: bar, OVER_SPARSIFY: SPARSIFY_BAR if direction == "forward" else None}
            over = {OVER_DENSE: DENSE, OVER_BAG: EMBEDDING_BAG, OVER_SPARSIFY: SPARSIFY}
            wanted = tuple(
                Wanted(
                    Figure(SECTION, f"{direction}, {name}", column, bars.get(column) if barred else None), OURS, (side,)
                )
                for column, side in over.items()
            )
            yield Job(wanted, kernels, partial(measure, size, effort, device))


@lru_cache(maxsize=1)
def _draw(size: Size, device: torch.device) -> Decoder:
    latents, k, width, tokens = size
    draw = partial(numbers, dtype=torch.bfloat16, device=device)
    return Decoder(
        size, *topk_rows(tokens, latents, k, device), draw(tokens * k), draw(latents, width), draw(tokens, width)
    )


def _forward(size: Size, effort: Effort, device: torch.device) -> Raced:
    of = _draw(size, device)
    _, k, _, tokens = of.size
    ours = partial(gather.matmul, of.crow_indices, of.indices, of.values, of.weight)
    rows = torch.randperm(tokens, device=of.weight.device)[:CHECKED]
    require("the forward product", ours(), _right_forward(of, rows))
    activations, places, values = of.activations, of.indices.view(tokens, k), of.values.view(tokens, k)
    bag = partial(functional.embedding_bag, places, of.weight, mode="sum", per_sample_weights=values)
    sides = Sides({DENSE: [partial(torch.mm, activations, of.weight)], OURS: [ours]})
    sides.offer(EMBEDDING_BAG, lambda: [bag])
    sides.offer(SPARSIFY, lambda: [partial(sparsify_kernels().embedding_bag_triton, places, of.weight, values)])
    return sides.race(effort)


def _backward(size: Size, effort: Effort, device: torch.device) -> Raced:
    of = _draw(size, device)
    latents, k, _, tokens = of.size
    ours = partial(counting_sort.row_gradients, of.crow_indices, of.indices, of.values, of.dy, of.weight)
    dots, gradient = ours()
    features = torch.randperm(latents, device=of.weight.device)[:CHECKED]
    require("the gradient of the weight", gradient, _right_gradient(of, features))
    require("the gradient of the values", dots.view(tokens, k), _right_dots(of))
    del dots, gradient
    activations, places = of.activations, of.indices.view(tokens, k)
    weight, values = of.weight.detach().requires_grad_(), of.values.view(tokens, k).detach().requires_grad_()

    def bag() -> list[Call]:
        y = functional.embedding_bag(places, weight, mode="sum", per_sample_weights=values)
        return [lambda: torch.autograd.grad(y, (weight, values), of.dy, retain_graph=True)]

    def sparsify() -> list[Call]:
        operands = places, of.weight, of.values.view(tokens, k), of.dy
        return [partial(sparsify_kernels().embedding_bag_bw_rev_indices, *operands)]

    def dense() -> object:
        return torch.mm(of.dy, of.weight.t()), torch.mm(activations.t(), of.dy)

    sides = Sides({DENSE: [dense], OURS: [ours]})
    sides.offer(EMBEDDING_BAG, bag)
    sides.offer(SPARSIFY, sparsify)
    return sides.race(effort, graphs=False)


def _right_forward(of: Decoder, rows: Tensor) -> Expected:
    k = of.size[1]
    places, values = (one.view(-1, k)[rows].reshape(-1) for one in (of.indices, of.values))
    starts = torch.arange(0, rows.numel() * k + 1, k, dtype=torch.int32, device=rows.device)
    few, places = places.unique(return_inverse=True)
    weight = of.weight[few.long()].double()
    exact = reference_rows.matmul(starts, places.int(), values.double(), weight)
    size = reference_rows.matmul(starts, places.int(), values.double().abs(), weight.abs())
    right = sums(exact, size, torch.tensor(k, device=rows.device), of.values.dtype)
    return Expected(right.exact, right.bound, (rows,), (of.size[3], of.size[2]))


def _right_gradient(of: Decoder, features: Tensor) -> Expected:
    activations, dy = of.activations[:, features].double().t(), of.dy.double()
    terms = (activations != 0).sum(1, keepdim=True)
    right = sums(activations @ dy, activations.abs() @ dy.abs(), terms, of.values.dtype)
    return Expected(right.exact, right.bound, (features,), (of.size[0], of.size[2]))


def _right_dots(of: Decoder) -> Expected:
    k, width, tokens = of.size[1], of.size[2], of.size[3]
    rows = torch.randperm(tokens, device=of.dy.device)[:CHECKED]
    weight, dy = of.weight[of.indices.view(tokens, k)[rows].long()].double(), of.dy[rows].double()[:, :, None]
    exact, size = (weight @ dy)[:, :, 0], (weight.abs() @ dy.abs())[:, :, 0]
    right = sums(exact, size, torch.tensor(width, device=rows.device), of.values.dtype)
    return Expected(right.exact, right.bound, (rows,), (tokens, k))
