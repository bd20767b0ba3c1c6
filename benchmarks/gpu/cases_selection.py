"""Cases of the selections: which scores are the largest, where many are equal, and of a product."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from gpu.check import Case, exactly
from gpu.draws import numbers
from offpath.cost.bounds import Expected
from offpath.kernels.gpu import selection
from offpath.kernels.reference_rows import ROWS as DEFINITION

Shape = tuple[int, int, int]  # rows, columns, k
# The columns are also more than one block of a kernel's, and no multiple of one.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "tiny": ((3, 40, 5),),
    "small": ((3, 40, 5), (2, 5000, 70)),
    "full": ((1, 1, 1), (9, 50, 50), (64, 5000, 64), (33, 70001, 32), (512, 4096, 300)),
}
WIDTH = 24
# Whole numbers, of which many are equal; those of bfloat16 are it anyway, in many columns.
KINDS = ((torch.float32, True), (torch.float32, False), (torch.bfloat16, False), (torch.float64, True))


def cases(scale: str, device: torch.device) -> Iterator[Case]:
    """What is captured is replayed over other scores: those have their ties in other rows."""
    for shape in SHAPES[scale]:
        for dtype, whole in KINDS:
            yield from _of_scores(shape, dtype, whole, device)
        for dtype in (torch.float32, torch.bfloat16):
            yield _of_product(shape, dtype, device)


def _of_scores(shape: Shape, dtype: torch.dtype, whole: bool, device: torch.device) -> Iterator[Case]:
    rows, columns, k = shape
    x = numbers(rows, columns, dtype=dtype, device=device, whole=whole)
    threshold = numbers(columns, dtype=dtype, device=device)
    for kernel, operands in (("topk", (x, k)), ("batch_topk", (x, rows * k)), ("above", (x, threshold))):
        yield Case(
            kernel,
            _name(shape, dtype) + (", whole numbers" if whole else ""),
            partial(getattr(selection, kernel), *operands),
            partial(_right, kernel, *operands),
            (x,),
            captured=kernel != "above",  # which has to know how many entries there are
        )


def _of_product(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    rows, columns, k = shape
    draw = partial(numbers, dtype=dtype, device=device, whole=True)  # their scores are exact: which are largest is, too
    x, weight, bias = draw(rows, WIDTH), draw(columns, WIDTH), draw(columns)
    return Case(
        "encode_topk",
        _name(shape, dtype),
        partial(selection.encode_topk, x, weight, bias, k),
        partial(_right, "encode_topk", x, weight, bias, k),
        (x,),
    )


def _right(kernel: str, *operands: object) -> tuple[Expected, ...]:
    return tuple(map(exactly, getattr(DEFINITION, kernel)(*operands)))


def _name(shape: Shape, dtype: torch.dtype) -> str:
    rows, columns, k = shape
    return f"{str(dtype).removeprefix('torch.')}, {rows} x {columns}, k = {k}"
