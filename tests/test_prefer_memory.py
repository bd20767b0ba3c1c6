"""`prefer="memory"`: a layer takes no more than its dense weight, unless values and indices alone do."""

from __future__ import annotations

import pytest
import torch

from offpath import SparseLinear
from offpath.cost import memory_bytes
from offpath.ops import forced_methods

SHAPES = ((64, 64), (64, 128), (160, 96), (384, 200), (33, 1025))
DENSITIES = (0.02, 0.08, 0.12, 0.15, 0.22, 0.25, 0.3, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_plan_that_would_take_more_than_the_dense_weight_is_no_option(dtype: torch.dtype) -> None:
    """Whatever is the cheapest here: a plan and bits are made, and weighed where both may be."""
    allowed = []
    for rows, columns in SHAPES:
        for density in DENSITIES:
            layer = SparseLinear(columns, rows, bias=False, density=density, dtype=dtype, prefer="memory")
            methods = {option.method for option in layer.explain(64).options if option.product == "forward"}
            assert {"bitmap", "filled", "row-wise"} <= methods and "dense" not in methods
            allowed.append("bucketed" in methods)
            for method in ("bucketed", "bitmap"):
                with torch.no_grad(), forced_methods(forward=method):
                    layer(torch.zeros(2, columns, dtype=dtype))
            if allowed[-1]:
                assert memory_bytes(layer) <= rows * columns * dtype.itemsize
    assert any(allowed) and not all(allowed)
