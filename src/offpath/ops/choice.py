"""Which method computes a product: the cheapest that the machine's cost table knows, unless one is forced."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral

import torch
from torch import Tensor

from offpath import kernels
from offpath.kernels import Backend, KernelError
from offpath.kernels.calibration import BITMAP_MEASURED_BATCHES, cost_table
from offpath.kernels.costs import sizes_for
from offpath.kernels.methods import AT_ONCE, DENSE_METHODS, INT8_METHODS, METHODS, PRODUCTS
from offpath.kernels.operands import on_device_of

PREFERENCES = ("speed", "memory")
# Filled and dense take the same time at any sparsity and so cannot lose much to `nn.Linear`: the better of them wins
# near-ties. It wins more of them where less is known: on a GPU, whose costs are estimated, and over bits beyond the
# tokens up to which they are measured. Steps of 2048 x 2048 with 64 tokens over bits, predicted to take 5 to 10 % less
# on a CPU, took 7 % more.
STEADY_MARGIN, STEADY_OVER_UNSURE_MARGIN = 1.05, 1.12
# A weight that is written out goes through caches which a training step leaves colder than the measurement does: with
# AVX-512, its step at 1024 x 1024 in bfloat16 takes 6 % longer than predicted, that of filled 1 %. On AVX2 it is the
# products of filled that take up to 15 % longer (2048 x 2048 and 3072 x 768 in float32), and those of dense do not.
FILLED_MARGIN, NARROW_FILLED_MARGIN = 1.1, 0.9
# The row-wise form falls behind a plan as soon as its inputs leave a cache, which happens between the sizes measured;
# and two gradients over plans share the packing of dy, which they are measured without.
PLAN_MARGIN = 1.15
# With bits instead of the second plan, dy is gone through three times and not once: for dX, the values and the bias.
# With 16 tokens at 1024 x 1024 and 3072 x 768, steps over two plans were 3 to 12 % faster where tiles were predicted to
# take 1.3 to 1.6 times as long as bits, and 1 % slower at 1.7.
TILED_BESIDE_PLAN_MARGIN = 1.6
# One call for both gradients checks operands, sums dy and wakes threads once: a tenth of a small layer's step. Costs
# are measured without a step around them, where less of that is seen. Beside a plan, the margin above has it in it.
APART_SECONDS = 1e-5
# What int8 values cost where a copy in another dtype is multiplied: three more calls, every value written and read once
# more, every sum scaled in a pass of its own. On a Xeon's two threads: 0.24 ns a value, 1 ns a sum.
INT8_CALLS_SECONDS, INT8_VALUE_SECONDS, INT8_SUM_SECONDS = 1.5e-5, 2.4e-10, 1e-9
# How many times as long as with values of the activations' dtype the others take: over bits, bytes are widened for
# every eight tokens anew, and bfloat16 is not multiplied in pairs. From 512 x 512 to 4096 x 4096 on a Zen 4's two
# threads, over bits 1.1 to 1.7; in bfloat16, filled and over a plan, 1.0 to 1.4. In float32, what is read is less.
INT8_TIMES = {"bitmap": 1.4}
INT8_TIMES_BFLOAT16 = INT8_TIMES | {"filled": 1.2, "bucketed": 1.2}
CHOICES_KEPT = 1024  # by what was made of one pattern: for each number of tokens, and texts have thousands of lengths
_OVER_A_PLAN = ("bucketed", "tiled")
# What a connection takes beside its value, an index and a place in a plan, which also takes some for each row; and
# what a position takes in bits, which are kept for few tokens.
INDEX_BYTES, PLAN_BYTES, PLAN_ROW_BYTES, BITS_BYTES = 4, 8, 80, 0.2
_forced: list[dict[str, str]] = []


@dataclass(frozen=True)
class Option:
    """One method of one product and the seconds it is expected to take; None where nothing is measured."""

    product: str
    method: str
    seconds: float | None


@dataclass(frozen=True)
class Explanation:
    """How the products of a layer are computed for a batch: what is chosen, and what else there is."""

    backend: str
    reason: str
    chosen: dict[str, str]
    options: tuple[Option, ...]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.reason}"]
        for option in self.options:
            mark = "*" if self.chosen[option.product] == option.method else " "
            time = "not measured" if option.seconds is None else f"{option.seconds * 1e6:10.1f} us"
            lines.append(f"{mark} {option.product:<8} {option.method:<9} {time}")
        return "\n".join(lines)


@contextmanager
def forced_methods(**methods: str) -> Iterator[None]:
    """Compute `forward`, `dx` and `dvalues` by the methods named here, everywhere in the process, inside the block.

    Raises `KernelError` for a product or method that does not exist.

    >>> with forced_methods(forward="bucketed", dx="row-wise"):
    ...     pass
    """
    for product, method in methods.items():
        if method not in METHODS.get(product, ()):
            known = "; ".join(f"{p}: {', '.join(m)}" for p, m in METHODS.items())
            raise KernelError(f"expected a product and one of its methods ({known}), got {product}={method!r}")
    _forced.append(methods)
    try:
        yield
    finally:
        _forced.remove(methods)


def choose(
    backend: Backend,
    product: str,
    rows: int,
    columns: int,
    nnz: int,
    batch: int,
    dtype: torch.dtype,
    prefer: str,
    dx_method: str | None = None,
    int8: bool = False,
) -> str:
    """The method for one product, with values of `dtype` or, where activations alone are, of int8.

    `prefer` "memory" leaves out those that write the weight out dense, and those over a plan with which the layer would
    take more than its dense weight.

    For `dvalues`, `dx_method` is what computes the gradient of x in the same call, if one does.
    """
    forced = forced_method(product)
    if forced is not None:
        if forced not in backend.methods:
            has = ", ".join(m for m in METHODS[product] if m in backend.methods)
            raise KernelError(f"expected a method that backend {backend.name!r} has ({has}), got {product}={forced!r}")
        return forced
    seconds = seconds_of(backend, dtype, rows, columns)
    allowed = _allowed(backend, product, rows, columns, nnz, dtype, prefer)
    if seconds is None:
        return "row-wise"
    costs = {m: seconds(product, m, rows, columns, nnz, batch) for m in allowed}
    if dx_method in ("filled", "bitmap") and backend.native:
        costs = {m: cost if m in AT_ONCE[dx_method] else cost + APART_SECONDS for m, cost in costs.items()}
    if int8 and backend.native:
        copied = INT8_CALLS_SECONDS + nnz * INT8_VALUE_SECONDS + batch * rows * INT8_SUM_SECONDS
        times = INT8_TIMES_BFLOAT16 if dtype is torch.bfloat16 else INT8_TIMES
        costs = {m: cost * times.get(m, 1) if m in INT8_METHODS else cost + copied for m, cost in costs.items()}
    best = min(costs, key=costs.__getitem__)
    filled, dense = costs.get("filled", math.inf), costs.get("dense", math.inf)
    steady = "filled" if filled <= filled_margin(backend) * dense else "dense"
    is_unsure = not backend.native or (best == "bitmap" and batch > BITMAP_MEASURED_BATCHES[product])
    if costs.get(steady, math.inf) <= (STEADY_OVER_UNSURE_MARGIN if is_unsure else STEADY_MARGIN) * costs[best]:
        return steady
    if best == "bitmap" and dx_method == "bucketed":
        return "tiled" if costs.get("tiled", math.inf) <= TILED_BESIDE_PLAN_MARGIN * costs[best] else best
    if best == "row-wise":
        return next((m for m in _OVER_A_PLAN if costs.get(m, math.inf) <= PLAN_MARGIN * costs[best]), best)
    return best


def filled_margin(backend: Backend) -> float:
    """How much longer than dense filled may be expected to take where it is chosen."""
    return FILLED_MARGIN if "avx512" in backend.name else NARROW_FILLED_MARGIN


def seconds_of(backend: Backend, dtype: torch.dtype, rows: int, columns: int) -> Callable[..., float] | None:
    """What tells the seconds of (product, method, rows, columns, nnz, batch); None where nothing is known."""
    if backend.native:
        return cost_table(backend, dtype, sizes_for(rows, columns)).predict
    return None if backend.costs is None else partial(backend.costs.layer, dtype=dtype)


def forced_method(product: str) -> str | None:
    """The method that `forced_methods` asks for."""
    return next((methods[product] for methods in reversed(_forced) if product in methods), None)


def any_forced() -> bool:
    """Whether a choice must be made anew instead of remembered."""
    return bool(_forced)


def explain(values: Tensor, shape: tuple[int, int], batch: int, prefer: str = "speed") -> Explanation:
    """How the products of a weight of `shape` (out, in) with these `values` are computed, and what they would cost.

    Raises `ValueError` for a batch that is no number of tokens.
    """
    if not isinstance(batch, Integral) or batch < 0:
        got = type(batch).__name__ if isinstance(batch, Tensor) else repr(batch)
        raise ValueError(f"expected the number of tokens of a batch, such as 128, got {got}")
    backend, dtype = kernels.select(values.device.type, values.dtype), values.dtype
    size = (*shape, values.numel(), batch)
    seconds = seconds_of(backend, dtype, *shape)
    with on_device_of(values):
        options = tuple(
            Option(p, m, _measured(seconds(p, m, *size)) if seconds else None)
            for p in PRODUCTS
            for m in _allowed(backend, p, *shape, values.numel(), dtype, prefer)
        )
        chosen = {p: choose(backend, p, *size, dtype, prefer) for p in PRODUCTS if p != "dvalues"}
        chosen["dvalues"] = choose(backend, "dvalues", *size, dtype, prefer, chosen["dx"])
    return Explanation(backend.name, reason(seconds is not None, prefer), chosen, options)


def reason(known: bool, prefer: str) -> str:
    """Why methods are chosen as they are: their costs are `known` or not, and some may be forced."""
    said = f'the cheapest for prefer="{prefer}"' if known else "nothing is known of its methods' costs"
    if _forced:
        said = f"{said}, except where forced: {', '.join(f'{p}={m}' for f in _forced for p, m in f.items())}"
    return said


def _measured(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None


def _allowed(
    backend: Backend, product: str, rows: int, columns: int, nnz: int, dtype: torch.dtype, prefer: str
) -> list[str]:
    if prefer not in PREFERENCES:
        raise KernelError(f"expected prefer to be 'speed' or 'memory', got {prefer!r}")
    left_out: tuple[str, ...] = ()
    if prefer == "memory":
        with_plan = nnz * (dtype.itemsize + INDEX_BYTES + PLAN_BYTES) + rows * (PLAN_ROW_BYTES + columns * BITS_BYTES)
        left_out = DENSE_METHODS + (_OVER_A_PLAN if with_plan > rows * columns * dtype.itemsize else ())
    return [m for m in METHODS[product] if m in backend.methods and m not in left_out]
