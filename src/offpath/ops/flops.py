"""What torch's FLOP counter (`torch.utils.flop_counter`) counts for each op: without a formula, it would count zero.

Two for each multiply-add with an entry that is stored, as the literature on sparse training counts, whichever kernel
computes the product: where it is computed densely because that is faster, the processor does more than that.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_COUNTER = "torch.utils.flop_counter"


def _tokens(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _positions(images: Tensor) -> int:
    return images.shape[0] * math.prod(images.shape[2:])


def _pairs(indices: Tensor, w_crow_indices: Tensor, w_indices: Tensor) -> int:
    """How often an entry of sparse rows meets a connection of a sparse weight."""
    if isinstance(indices, FakeTensor) or indices.is_meta:  # nobody knows: as many as indices at random meet
        return indices.shape[0] * w_indices.shape[0] // max(1, w_crow_indices.shape[0] - 1)
    return int(w_crow_indices.diff()[indices.long()].sum())


# Multiply-adds of an op, of its operands and its result.
MULTIPLY_ADDS: dict[str, Callable[..., int]] = {
    "sparse_linear": lambda y, x, values, *_: _tokens(x) * values.numel(),
    "sparse_linear_dx": lambda dx, dy, values, *_: _tokens(dy) * values.numel(),
    "sparse_linear_dvalues": lambda dvalues, dy, *_: _tokens(dy) * dvalues.numel(),
    "sparse_linear_backward": lambda gradients, dy, x, values, *_: 2 * _tokens(dy) * values.numel(),
    "sparse_conv2d": lambda y, x, values, *_: _positions(y) * values.numel(),
    "sparse_conv2d_dx": lambda dx, dy, values, *_: _positions(dy) * values.numel(),
    "sparse_conv2d_dvalues": lambda dvalues, dy, *_: _positions(dy) * dvalues.numel(),
    "int8_linear": lambda y, x, values, *_: _tokens(x) * values.numel(),
    # `slots`: one for each connection, while `values` hold padding too.
    "packed_linear": lambda y, x, values, columns, gaps, group_offsets, slots, *_: _tokens(x) * slots.numel(),
    "live_linear": lambda y, x, weight, *_: _tokens(x) * weight.numel(),
    "encode_topk": lambda top, x, weight, *_: x.shape[0] * weight.numel(),
    "rows_matmul": lambda y, values, *_: values.numel() * y.shape[1],
    "rows_dots": lambda dots, dy, *_: dots.numel() * dy.shape[1],
    "rows_weight_gradient": lambda dweight, values, *_: values.numel() * dweight.shape[1],
    "rows_encoder_gradients": lambda gradients, values, *_: values.numel() * gradients[0].shape[1],
    "rows_gradients": lambda gradients, dy, values, *_: 2 * values.numel() * dy.shape[1],
    "add_rows_weight_gradient": lambda nothing, buffer, values, *_: values.numel() * buffer.shape[1],
    "rows_sparse_matmul": lambda y, v, c, indices, w_values, *weight: _pairs(indices, *weight[:2]),
    "rows_sparse_dots": lambda dots, dy, c, indices, w_values, *weight: _pairs(indices, *weight),
    "rows_sparse_weight_gradient": lambda dweight, v, c, indices, dy, *weight: _pairs(indices, *weight),
}


def register_when_imported() -> None:
    """Give the counter the formulas of all ops, which have to be there: now, or when somebody imports it."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())


def _register(counter: ModuleType) -> None:
    for name, multiply_adds in MULTIPLY_ADDS.items():
        counter.register_flop_formula(getattr(torch.ops.offpath, name), get_raw=True)(_formula(multiply_adds))


def _formula(multiply_adds: Callable[..., int]) -> Callable[..., int]:
    return lambda *operands, out_val: 2 * multiply_adds(out_val, *operands)  # all by position, whoever names them


class _WhenImported(MetaPathFinder):
    """Not imported by us: the counter imports Triton, which takes a sixth of a second."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # of this one loader alone
        return spec
