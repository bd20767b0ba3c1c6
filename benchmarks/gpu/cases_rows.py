"""Cases of the products on sparse rows: gathers, and sums by what an index names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gpu.check import Case, exactly, sums
from gpu.draws import numbers, ragged_rows
from offpath.cost.bounds import Expected
from offpath.kernels import reference_rows
from offpath.kernels.gpu import counting_sort, densely, gather
from offpath.ops.selection import to_dense

Shape = tuple[int, int, int, int]  # rows, columns, the most entries of a row, width
# The width is also more than a block of neighbours, and no multiple of one.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "tiny": ((3, 4, 9, 35),),
    "small": ((5, 7, 19, 33), (3, 40, 5, 1100)),
    "full": ((1, 1, 1, 1), (9, 50, 3, 33), (64, 1000, 64, 1024), (33, 4096, 17, 1025), (128, 8192, 64, 4096)),
}
# dtype, and whether its numbers are whole
KINDS = (
    (torch.float32, True),
    (torch.float32, False),
    (torch.bfloat16, True),
    (torch.bfloat16, False),
    (torch.float64, False),
)
FEW_KINDS = ((torch.float32, True), (torch.bfloat16, False))  # where everything takes its time
# Of bfloat16 weights with more than 2^31 elements, as many rows as hold the last indices.
FAR_ROWS, FAR_WIDTH, FAR_BYTES = 560_000, 4096, 3 * 560_000 * 4096 * 2


@dataclass(frozen=True)
class Rows:
    """Sparse rows and what they meet: `weight` [columns, width] and `dy` [rows, width]."""

    name: str
    crow_indices: Tensor
    indices: Tensor
    values: Tensor
    weight: Tensor
    dy: Tensor
    whole: bool

    def right(self, product: Callable[..., Tensor], terms: Tensor, *operands: Tensor | int) -> Expected:
        """What a product of the reference comes to: to the bit for whole numbers."""
        exact, size = (
            product(self.crow_indices, self.indices, *_doubles(operands, by)) for by in (torch.clone, torch.abs)
        )
        dtype = self.values.dtype
        return exactly(exact.to(dtype)) if self.whole else sums(exact, size, terms, dtype)

    def dots(self) -> Expected:
        width = torch.tensor(self.dy.shape[1], device=self.dy.device)
        return self.right(reference_rows.dots, width, self.dy, self.weight)

    def gradient(self) -> Expected:
        columns = self.weight.shape[0]
        return self.right(reference_rows.weight_gradient, self.named()[:, None], self.values, self.dy, columns)

    def totals(self) -> Expected:
        """The sum of the values at each column."""
        exact, size = (
            torch.zeros(self.weight.shape[0], dtype=torch.float64, device=by.device).index_add_(0, self.indices, by)
            for by in (self.values.double(), self.values.double().abs())
        )
        dtype = self.values.dtype
        return exactly(exact.to(dtype)) if self.whole else sums(exact, size, self.named(), dtype)

    def named(self) -> Tensor:
        """How many entries name each column."""
        return torch.bincount(self.indices, minlength=self.weight.shape[0])


def gathers(scale: str, device: torch.device) -> Iterator[Case]:
    """Weighted sums of rows, and dots with them."""
    for of in _rows(scale, device):
        operands = of.crow_indices, of.indices
        yield Case(
            "gather_sum",
            of.name,
            partial(gather.matmul, *operands, of.values, of.weight),
            lambda of=of: (of.right(reference_rows.matmul, of.crow_indices.diff()[:, None], of.values, of.weight),),
            (of.values,),
        )
        yield Case(
            "gather_dot",
            of.name,
            partial(gather.dots, *operands, of.dy, of.weight),
            lambda of=of: (of.dots(),),
            (of.dy,),
        )
        yield Case(
            "written_out",
            of.name,
            partial(densely.written_out, *operands, of.values, of.weight.shape[0]),
            partial(_written_out, of),
            (of.values,),
        )
    if _far_fits(scale, device):
        yield from _far_gathers(device)


def by_name(scale: str, device: torch.device) -> Iterator[Case]:
    """Sums by what an index names."""
    for of in _rows(scale, device):
        operands = of.crow_indices, of.indices, of.values, of.dy
        buffer = numbers(*of.weight.shape, dtype=of.values.dtype, device=device, whole=of.whole)
        inputs = of.values, of.dy
        yield Case(
            "weight_gradient",
            of.name,
            partial(counting_sort.weight_gradient, *operands, of.weight.shape[0]),
            lambda of=of: (of.gradient(),),
            inputs,
        )
        yield Case(
            "add_weight_gradient", of.name, partial(_added, operands, buffer), partial(_added_right, of, buffer), inputs
        )
        yield Case(
            "row_gradients",
            of.name,
            partial(counting_sort.row_gradients, *operands, of.weight),
            lambda of=of: (of.dots(), of.gradient()),
            inputs,
        )
        yield Case(
            "encoder_gradients",
            of.name,
            partial(counting_sort.encoder_gradients, *operands, of.weight.shape[0]),
            lambda of=of: (of.gradient(), of.totals()),
            inputs,
        )
    indices = torch.randint(0, 300, (1000,), device=device, dtype=torch.int32)
    yield Case(
        "counts",
        "repeated indices",
        partial(counting_sort.counts, indices, 301),
        lambda: (exactly(torch.bincount(indices, minlength=301)),),
    )
    if _far_fits(scale, device):
        yield from _far_by_name(device)


def _rows(scale: str, device: torch.device) -> Iterator[Rows]:
    """Every shape and dtype; whole numbers, then normal ones."""
    for rows, columns, most, width in SHAPES[scale]:
        for dtype, whole in KINDS if scale == "full" else FEW_KINDS:
            crow_indices, indices = ragged_rows(rows, columns, most, device)
            draw = partial(numbers, dtype=dtype, device=device, whole=whole)
            name = f"{str(dtype).removeprefix('torch.')}, {rows} x {columns} x {width}"
            of = Rows(
                name + (", whole numbers" if whole else ""),
                crow_indices,
                indices,
                draw(indices.numel()),
                draw(columns, width),
                draw(rows, width),
                whole,
            )
            of.weight[of.named() == 0] = torch.nan  # nobody may read these
            yield of


def _written_out(of: Rows) -> tuple[Expected]:
    columns = of.weight.shape[0]

    def product(crow_indices: Tensor, indices: Tensor, values: Tensor) -> Tensor:
        return to_dense(crow_indices, indices, values, columns)

    return (of.right(product, of.crow_indices.diff()[:, None], of.values),)


def _added(operands: tuple[Tensor, ...], buffer: Tensor) -> Tensor:
    target = buffer.clone()
    counting_sort.add_weight_gradient(*operands, target)
    return target


def _added_right(of: Rows, buffer: Tensor) -> tuple[Expected]:
    def product(*operands: Tensor) -> Tensor:
        return reference_rows.weight_gradient(*operands[:4], buffer.shape[0]) + operands[4]

    return (of.right(product, of.named()[:, None] + 1, of.values, of.dy, buffer),)


@dataclass(frozen=True)
class Far:
    """Rows that begin behind 2^31 elements, where 32 bits are too few; `few` are those that are named."""

    rows: Rows
    seen: Tensor
    few: Rows


def _far_fits(scale: str, device: torch.device) -> bool:
    return scale == "full" and device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 2 * FAR_BYTES


def _far(device: torch.device) -> Far:
    rows, k, name = 64, 32, "bfloat16, rows behind 2^31 elements"
    weight = torch.empty(FAR_ROWS, FAR_WIDTH, dtype=torch.bfloat16, device=device).normal_()
    crow_indices = torch.arange(0, rows * k + 1, k, dtype=torch.int32, device=device)
    indices = torch.randint(2**31 // FAR_WIDTH + 1, FAR_ROWS, (rows * k,), dtype=torch.int32, device=device)
    values = numbers(rows * k, dtype=torch.bfloat16, device=device)
    dy = numbers(rows, FAR_WIDTH, dtype=torch.bfloat16, device=device)
    seen, places = indices.unique(return_inverse=True)
    few = Rows(name, crow_indices, places.int(), values, weight[seen], dy, False)
    return Far(Rows(name, crow_indices, indices, values, weight, dy, False), seen, few)


def _far_gathers(device: torch.device) -> Iterator[Case]:
    far = _far(device)
    of, few = far.rows, far.few
    yield Case(
        "gather_sum",
        of.name,
        partial(gather.matmul, of.crow_indices, of.indices, of.values, of.weight),
        lambda: (few.right(reference_rows.matmul, few.crow_indices.diff()[:, None], few.values, few.weight),),
        captured=False,
    )
    yield Case(
        "gather_dot",
        of.name,
        partial(gather.dots, of.crow_indices, of.indices, of.dy, of.weight),
        lambda: (few.dots(),),
        captured=False,
    )


def _far_by_name(device: torch.device) -> Iterator[Case]:
    far = _far(device)
    of, few = far.rows, far.few

    def right() -> tuple[Expected, Expected]:
        gradient = few.gradient()
        return few.dots(), Expected(gradient.exact, gradient.bound, (far.seen,), tuple(of.weight.shape))

    yield Case(
        "row_gradients",
        of.name,
        partial(counting_sort.row_gradients, of.crow_indices, of.indices, of.values, of.dy, of.weight),
        right,
        captured=False,
    )


def _doubles(operands: tuple[Tensor | int, ...], by: Callable[[Tensor], Tensor]) -> list[Tensor | int]:
    return [by(one.double()) if isinstance(one, Tensor) else one for one in operands]
