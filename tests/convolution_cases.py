"""The table of convolutions, how they are asked for, and what every backend must pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cases import Operands
from checkers import REFERENCE, gamma, in_float64, poisoned_memory, unit_roundoff
from offpath import pattern as patterns
from offpath.kernels import Backend
from offpath.kernels.convolution import Convolution
from offpath.pattern import Pattern
from problems import Draw, gaussian, small_integers


@dataclass(frozen=True)
class ConvolutionProblem:
    """A convolution, how many images, and which connections; named by the condition that it tests."""

    name: str
    convolution: Convolution
    images: int = 2
    density: float = 0.3

    @property
    def pattern(self) -> Pattern:
        shape = self.convolution.weight_shape
        nnz = round(self.density * shape[0] * shape[1])
        return patterns.random(shape, nnz, torch.Generator().manual_seed(shape[0] * 7919 + shape[1]))


def convolution(
    channels: tuple[int, int], size: tuple[int, int], kernel: tuple[int, int], **given: int | tuple[int, int]
) -> Convolution:
    pairs = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)} | given
    groups, after = pairs.pop("groups", 1), pairs.pop("padding_after", pairs["padding"])
    return Convolution(*channels, groups, size, kernel, padding_after=after, **pairs)  # type: ignore[arg-type]


PROBLEMS = (
    ConvolutionProblem("one pixel", convolution((1, 1), (1, 1), (1, 1)), 1, 1.0),
    ConvolutionProblem("padding 1", convolution((5, 7), (9, 11), (3, 3), padding=(1, 1))),
    ConvolutionProblem("pointwise", convolution((20, 13), (5, 9), (1, 1))),
    ConvolutionProblem("pointwise, stride 2", convolution((6, 5), (9, 8), (1, 1), stride=(2, 2))),
    ConvolutionProblem("stride 2", convolution((4, 9), (13, 10), (3, 3), stride=(2, 2), padding=(1, 1))),
    ConvolutionProblem("stride over the kernel", convolution((3, 4), (17, 19), (2, 2), stride=(3, 5))),
    ConvolutionProblem("dilation", convolution((3, 8), (12, 15), (3, 2), padding=(2, 1), dilation=(2, 3))),
    ConvolutionProblem("groups", convolution((6, 9), (7, 8), (3, 3), padding=(1, 1), groups=3)),
    ConvolutionProblem("depthwise", convolution((8, 8), (9, 9), (3, 3), padding=(1, 1), groups=8), density=0.6),
    ConvolutionProblem("a row of pixels", convolution((4, 5), (1, 70), (1, 5), padding=(0, 2))),
    ConvolutionProblem("a column of pixels", convolution((4, 5), (70, 1), (5, 1), padding=(2, 0))),
    ConvolutionProblem("kernel larger than the image", convolution((3, 4), (2, 3), (5, 7), padding=(2, 3))),
    ConvolutionProblem("more padding than kernel", convolution((2, 3), (3, 4), (2, 2), padding=(4, 3), stride=(2, 1))),
    ConvolutionProblem("padding behind only", convolution((2, 3), (5, 6), (2, 4), padding_after=(1, 3))),
    ConvolutionProblem("pixels that no output reads", convolution((2, 3), (9, 9), (2, 2), stride=(4, 4))),
    ConvolutionProblem("no connections", convolution((3, 4), (5, 5), (3, 3)), density=0.0),
    ConvolutionProblem("every connection", convolution((3, 20), (5, 5), (3, 3)), density=1.0),
    ConvolutionProblem("no images", convolution((3, 4), (5, 5), (3, 3)), images=0),
    ConvolutionProblem(
        "several panels, strips, threads", convolution((40, 60), (20, 21), (3, 3), padding=(1, 1)), 2, 0.1
    ),
)


def contiguous(draw: Draw, *shape: int) -> Tensor:
    return draw(shape)


def channels_last(draw: Draw, *shape: int) -> Tensor:
    return draw(shape).contiguous(memory_format=torch.channels_last)


def a_slice(draw: Draw, *shape: int) -> Tensor:
    images, channels, height, width = shape
    return draw((images, channels + 1, height + 2, 2 * width))[:, 1:, 1:-1, ::2]


LAYOUTS: dict[str, Callable[..., Tensor]] = {
    "contiguous": contiguous,
    "channels-last": channels_last,
    "a slice": a_slice,
}
PRODUCTS = ("forward", "dx", "dvalues")


def drawn(product: str, problem: ConvolutionProblem, layout: str, draw: Draw) -> Operands:
    c, nnz, lay = problem.convolution, problem.pattern.nnz, LAYOUTS[layout]
    x = (problem.images, c.in_channels, *c.size)
    dy = (problem.images, c.out_channels, *c.outputs)
    if product == "forward":
        return {"values": draw((nnz,)), "x": lay(draw, *x), "bias": draw((c.out_channels,))}
    if product == "dx":
        return {"values": draw((nnz,)), "dy": lay(draw, *dy)}
    return {"dy": lay(draw, *dy), "x": lay(draw, *x)}


def run(product: str, backend: Backend, problem: ConvolutionProblem, operands: Operands, last: bool) -> Tensor:
    pattern, products = problem.pattern, backend.convolutions
    dtype = next(iter(operands.values())).dtype
    prepared = products.prepare(pattern.crow_indices, pattern.col_indices, problem.convolution, dtype)
    layout = () if product == "dvalues" else (last,)
    return getattr(products, product)(prepared, *operands.values(), *layout)


def terms(product: str, problem: ConvolutionProblem) -> Tensor:
    """How many products the longest sum adds up."""
    c = problem.convolution
    if product == "forward":
        return torch.tensor(max([*problem.pattern.row_counts.tolist(), 0]))
    if product == "dx":
        return torch.tensor(c.out_channels * c.kernel[0] * c.kernel[1])
    return torch.tensor(problem.images * c.outputs[0] * c.outputs[1])


def check_exact(product: str, backend: Backend, problem: ConvolutionProblem, layout: str, dtype: torch.dtype) -> None:
    """Small integers: the same bits as the reference in float64, in the memory format that was asked for."""
    operands = drawn(product, problem, layout, small_integers(1, dtype))
    before = {name: tensor.clone() for name, tensor in operands.items()}
    last = layout == "channels-last"
    with poisoned_memory():
        result = run(product, backend, problem, operands, last)
    expected = run(product, REFERENCE, problem, in_float64(operands), last).to(dtype)
    assert result.dtype == dtype and result.shape == expected.shape
    assert product == "dvalues" or result.is_contiguous(
        memory_format=torch.channels_last if last else torch.contiguous_format
    )
    assert torch.equal(result, expected), f"{product} of {problem.name}, {layout}: not exact"
    for name, tensor in operands.items():
        assert torch.equal(tensor, before[name]), f"{backend.name} modified its operand {name}"


def check_bounded(product: str, backend: Backend, problem: ConvolutionProblem, layout: str, dtype: torch.dtype) -> None:
    """Gaussian operands: |y - y64| <= gamma_k (|A| |x|), the a-priori bound for any order of summation."""
    operands = drawn(product, problem, layout, gaussian(2, dtype))
    last = layout == "channels-last"
    with poisoned_memory():
        result = run(product, backend, problem, operands, last)
    wide = in_float64(operands)
    exact = run(product, REFERENCE, problem, wide, last)
    size = run(product, REFERENCE, problem, {name: tensor.abs() for name, tensor in wide.items()}, last)
    summed_in = torch.float32 if dtype is torch.bfloat16 else dtype
    bound = (gamma(terms(product, problem), summed_in) + gamma(terms(product, problem), torch.float64)) * size
    if summed_in is not dtype:  # the sum is rounded once more, relative to what was summed
        bound += unit_roundoff(dtype) * (exact.abs() + bound)
    error = (result.double() - exact).abs()
    assert not bool(result.isnan().any()), f"{product} of {problem.name}: NaN"
    assert bool((error <= bound).all()), f"{product} of {problem.name}, {layout}: error over bound"
