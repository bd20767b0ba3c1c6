"""Every product of the table that the tests read, at the shapes of the bars, against dense and `torch.sparse`.

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

from cases import PRODUCTS, Operands, Product, gaussian
from contenders import SHAPES, Refused
from measure import check_product, dtype_name
from offpath import kernels, pattern as patterns
from offpath.kernels import KernelError
from offpath.pattern import Pattern

SPARSITY = 0.9
# Writing a weight out dense and picking from one have no rival to stand beside.
COMPARABLE = [product for product in PRODUCTS if product.name not in ("expand", "compress")]
Call = Callable[[], Tensor]


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

    prepared_once = replace(backend, plan=once(backend.plan), bitmap=once(backend.bitmap))
    return lambda: product.run(prepared_once, pattern, operands)


def _dense(product: Product, pattern: Pattern, operands: Operands) -> Call:
    if "dy" in operands:
        dy, x = operands["dy"], operands["x"]
        return lambda: dy.t() @ x
    x, weight, bias = operands["x"], pattern.to_dense(operands["values"]), operands.get("bias")
    if _is_transposed(product):
        return lambda: x @ weight
    return lambda: nn.functional.linear(x, weight, bias)


def _torch_sparse(product: Product, pattern: Pattern, operands: Operands) -> Call:
    if operands["x"].dtype is not torch.float32:
        raise Refused("torch.sparse has no CSR kernels for this dtype on the CPU")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        weight = pattern.to_dense(operands.get("values", torch.ones(pattern.nnz))).to_sparse_csr()
        if _is_transposed(product):
            weight = weight.to_dense().t().contiguous().to_sparse_csr()
    if "dy" in operands:
        dy, x = operands["dy"], operands["x"]
        return lambda: torch.sparse.sampled_addmm(weight, dy.t(), x, beta=0.0).values()
    x, bias = operands["x"], operands.get("bias")
    if bias is None:
        return lambda: torch.sparse.mm(weight, x.t()).t()
    return lambda: torch.sparse.mm(weight, x.t()).t() + bias


CONTENDERS = {"offpath": _offpath, "dense": _dense, "torch.sparse": _torch_sparse}


def _is_transposed(product: Product) -> bool:
    return "transpose" in product.name


@cache
def _pattern(inputs: int, outputs: int) -> Pattern:
    generator = torch.Generator().manual_seed(0)
    return patterns.random((outputs, inputs), round((1 - SPARSITY) * inputs * outputs), generator)


def _check(product: Product, pattern: Pattern, operands: Operands, result: Tensor) -> None:
    in_float64 = {name: tensor.double() for name, tensor in operands.items()}
    exact = _dense(product, pattern, in_float64)()
    size = _dense(product, pattern, {name: tensor.abs() for name, tensor in in_float64.items()})()
    if "dy" in operands:
        at = pattern.row_indices().long(), pattern.col_indices.long()
        exact, size = exact[at], size[at]
        result = result if result.dim() == 1 else result[at]
    check_product(product.name, result, exact, size, product.terms(pattern, operands["x"].shape[0]) + 1)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize(("inputs", "outputs", "batch"), SHAPES)
@pytest.mark.parametrize("product", COMPARABLE, ids=lambda product: product.name)
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
