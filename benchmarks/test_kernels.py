"""Every product of the table that the tests read, against dense and `torch.sparse`, at the shapes that it is made for.

Run with: .venv/bin/python -m pytest benchmarks (or make bench)
Each result is checked against float64 first. The contenders of a case run one after another, so look at `bars.py`,
which interleaves them, before you believe a ratio near 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import PRODUCTS, Operands, Product
from contenders import SHAPES, Refused
from measure import check_product, dtype_name
from offpath import kernels, pattern as patterns
from offpath.kernels import KernelError
from offpath.pattern import Pattern
from problems import gaussian

SPARSITY = 0.9
ONE_TOKEN = (4096, 4096, 1)
Call = Callable[[], Tensor]


def _shapes(product: Product) -> tuple[tuple[int, int, int], ...]:
    """Inputs, outputs and batch; none where a product has no rival of its own.

    Writing a weight out and picking from one are parts of others, and all gradients at once stand in `test_layers.py`.
    """
    if product.name in ("expand", "compress") or product.name.startswith("all gradients"):
        return ()
    if product.name.startswith("bitmap"):
        return (ONE_TOKEN,)
    for_many_tokens = product.name.startswith(("planned", "tiled", "filled"))
    return SHAPES if for_many_tokens else (*SHAPES, ONE_TOKEN)


# Products of int8 values have other rivals: benchmarks/int8.py.
CASES = [
    pytest.param(product, *shape, id="-".join(map(str, (product.name, *shape))))
    for product in PRODUCTS
    if "int8" not in product.name
    for shape in _shapes(product)
]


def _offpath(product: Product, pattern: Pattern, operands: Operands) -> Call:
    dtype = next(iter(operands.values())).dtype
    backend = kernels.select("cpu", dtype)
    made: dict[tuple[object, ...], Any] = {}

    def once(make: Callable[..., Any]) -> Callable[..., Any]:
        # A layer makes its plans and bits once; what is timed is what every call pays.
        def remembered(*arguments: Any) -> Any:
            key = (make, *(id(a) if isinstance(a, Tensor) else a for a in arguments))
            if key not in made:
                made[key] = make(*arguments)
            return made[key]

        return remembered

    made_once = {name: once(getattr(backend, name)) for name in ("plan", "tiles", "bitmap")}
    return lambda: product.run(replace(backend, **made_once), pattern, operands)


def _dense(product: Product, pattern: Pattern, operands: Operands) -> Call:
    if "values" not in operands:
        dy, x = operands["dy"], operands["x"]
        return lambda: dy.t() @ x
    weight, bias = pattern.to_dense(operands["values"]), operands.get("bias")
    x = _multiplied(operands)
    if _is_transposed(product):
        return lambda: x @ weight
    return lambda: nn.functional.linear(x, weight, bias)


def _torch_sparse(product: Product, pattern: Pattern, operands: Operands) -> Call:
    if next(iter(operands.values())).dtype is not torch.float32:
        raise Refused("torch.sparse has no CSR kernels for this dtype on the CPU")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        weight = pattern.to_dense(operands.get("values", torch.ones(pattern.nnz))).to_sparse_csr()
        if _is_transposed(product):
            weight = weight.to_dense().t().contiguous().to_sparse_csr()
    if "values" not in operands:
        dy, x = operands["dy"], operands["x"]
        return lambda: torch.sparse.sampled_addmm(weight, dy.t(), x, beta=0.0).values()
    x, bias = _multiplied(operands), operands.get("bias")
    if bias is None:
        return lambda: torch.sparse.mm(weight, x.t()).t()
    return lambda: torch.sparse.mm(weight, x.t()).t() + bias


CONTENDERS = {"offpath": _offpath, "dense": _dense, "torch.sparse": _torch_sparse}


def _is_transposed(product: Product) -> bool:
    return "transpose" in product.name or product.name.endswith(" dx")


def _multiplied(operands: Operands) -> Tensor:
    return operands["dy"] if "dy" in operands else operands["x"]


@cache
def _pattern(inputs: int, outputs: int) -> Pattern:
    generator = torch.Generator().manual_seed(0)
    return patterns.random((outputs, inputs), round((1 - SPARSITY) * inputs * outputs), generator)


def _check(product: Product, pattern: Pattern, operands: Operands, result: Tensor) -> None:
    in_float64 = {name: tensor.double() for name, tensor in operands.items()}
    exact = _dense(product, pattern, in_float64)()
    size = _dense(product, pattern, {name: tensor.abs() for name, tensor in in_float64.items()})()
    if "values" not in operands:
        at = pattern.row_indices().long(), pattern.col_indices.long()
        exact, size = exact[at], size[at]
        result = result if result.dim() == 1 else result[at]
    check_product(product.name, result, exact, size, product.terms(pattern, _multiplied(operands).shape[0]) + 1)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(("product", "inputs", "outputs", "batch"), CASES)
def test_product(
    benchmark: Any, product: Product, inputs: int, outputs: int, batch: int, dtype: torch.dtype, contender: str
) -> None:
    benchmark.group = f"{product.name}, {inputs} -> {outputs}, batch {batch}, {SPARSITY:.0%}, {dtype_name(dtype)}"
    benchmark.name = contender
    pattern = _pattern(inputs, outputs)
    operands = product.draw(pattern, batch, gaussian(0, dtype))
    try:
        call = CONTENDERS[contender](product, pattern, operands)
    except (KernelError, Refused) as error:
        pytest.skip(f"refused: {error}")
    _check(product, pattern, operands, call())
    benchmark(call)
