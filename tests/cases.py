"""The products that every kernel test reads: a new one joins all of them by adding a row to PRODUCTS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from offpath.kernels import Backend
from offpath.pattern import Pattern
from problems import Draw

Operands = dict[str, Tensor]


@dataclass(frozen=True)
class Product:
    """One product: how to draw its operands, how to ask a backend for it, and how many terms each output sums."""

    name: str
    draw: Callable[[Pattern, int, Draw], Operands]
    run: Callable[[Backend, Pattern, Operands], Tensor]
    terms: Callable[[Pattern, int], Tensor]


def _spmm(backend: Backend, pattern: Pattern, operands: Operands) -> Tensor:
    return backend.spmm(pattern.crow_indices, pattern.col_indices, **operands)


def _planned_spmm(backend: Backend, pattern: Pattern, operands: Operands) -> Tensor:
    dtype = operands["values"].dtype
    plan = backend.plan(pattern.crow_indices, pattern.col_indices, pattern.shape[1], dtype)
    return backend.planned_spmm(plan, operands["values"], operands["x"], operands.get("bias"))


def _feature_major_spmm(backend: Backend, pattern: Pattern, operands: Operands) -> Tensor:
    dtype = operands["values"].dtype
    plan = backend.plan(pattern.crow_indices, pattern.col_indices, pattern.shape[1], dtype)
    return backend.planned_spmm(plan, operands["values"], operands["x"], operands["bias"], feature_major=True)


def _transposed_spmm(backend: Backend, pattern: Pattern, operands: Operands) -> Tensor:
    crow_indices, col_indices, permutation = pattern.transpose()
    plan = backend.plan(crow_indices, col_indices, pattern.shape[0], operands["values"].dtype, permutation)
    return backend.planned_spmm(plan, **operands)


def _bitmap_spmm(backend: Backend, pattern: Pattern, operands: Operands) -> Tensor:
    return backend.bitmap_spmm(_bitmap(backend, pattern), **operands)


def _bitmap(backend: Backend, pattern: Pattern):
    return backend.bitmap(pattern.crow_indices, pattern.col_indices, pattern.shape[1])


def _sddmm(backend: Backend, pattern: Pattern, operands: Operands) -> Tensor:
    return backend.sddmm(pattern.crow_indices, pattern.col_indices, **operands)


def _tiled_sddmm(backend: Backend, pattern: Pattern, operands: Operands) -> Tensor:
    tiles = backend.tiles(pattern.crow_indices, pattern.col_indices, pattern.shape[1])
    return backend.tiled_sddmm(tiles, **operands)


def _filled_spmm(backend: Backend, pattern: Pattern, operands: Operands) -> Tensor:
    return backend.filled_spmm(_bitmap(backend, pattern), operands["values"], operands["x"], operands.get("bias"))


def _feature_major_filled_spmm(backend: Backend, pattern: Pattern, operands: Operands) -> Tensor:
    bitmap = _bitmap(backend, pattern)
    return backend.filled_spmm(bitmap, operands["values"], operands["x"], operands["bias"], feature_major=True)


def _backward(dx: str, dvalues: str) -> Callable[[Backend, Pattern, Operands], Tensor]:
    def run(backend: Backend, pattern: Pattern, operands: Operands) -> Tensor:
        transpose = tiles = None
        if dx == "bucketed":
            crow_indices, col_indices, permutation = pattern.transpose()
            transpose = backend.plan(crow_indices, col_indices, pattern.shape[0], operands["values"].dtype, permutation)
        if "bitmap" in (dx, dvalues):
            fills = {"fills_dx": dx == "filled", "fills_dvalues": dvalues == "filled"}
            gradients = backend.bitmap_backward(_bitmap(backend, pattern), *operands.values(), **fills)
            return torch.cat([g.flatten() for g in gradients])
        if dvalues == "tiled":
            tiles = backend.tiles(pattern.crow_indices, pattern.col_indices, pattern.shape[1])
        bitmap = _bitmap(backend, pattern) if "filled" in (dx, dvalues) else None
        feature_major = operands["x"].stride(0) == 1
        gradients = backend.backward(transpose, tiles, bitmap, *operands.values(), feature_major=feature_major)
        return torch.cat([g.flatten() for g in gradients])

    return run


def _terms_of_gradients(pattern: Pattern, batch: int) -> Tensor:
    of_dx = pattern.transpose().crow_indices.diff().repeat(batch)
    return torch.cat([of_dx, torch.full((pattern.nnz + pattern.shape[0],), batch)])


def _token_major(pattern: Pattern, batch: int, draw: Draw) -> Operands:
    rows, columns = pattern.shape
    return {"values": draw((pattern.nnz,)), "dy": draw((batch, rows)), "x": draw((batch, columns))}


def _feature_major(pattern: Pattern, batch: int, draw: Draw) -> Operands:
    rows, columns = pattern.shape
    return {"values": draw((pattern.nnz,)), "dy": draw((rows, batch)).t(), "x": draw((columns, batch)).t()}


def _int8_operands(pattern: Pattern, draw: Draw) -> Operands:
    """Values that fill a byte and a float32 scale for each row, where `draw` draws numbers around 1."""
    values = (draw((pattern.nnz,)).double() * 42).round().clamp(-127, 127).to(torch.int8)
    return {"values": values, "scales": draw((pattern.shape[0],)).float()}


def _bitmap_int8_spmm(backend: Backend, pattern: Pattern, operands: Operands) -> Tensor:
    return backend.bitmap_int8_spmm(_bitmap(backend, pattern), *operands.values())


def _filled_int8_spmm(backend: Backend, pattern: Pattern, operands: Operands) -> Tensor:
    return backend.filled_int8_spmm(_bitmap(backend, pattern), *operands.values())


def _planned_int8_spmm(backend: Backend, pattern: Pattern, operands: Operands) -> Tensor:
    plan = backend.plan(pattern.crow_indices, pattern.col_indices, pattern.shape[1], operands["x"].dtype)
    return backend.planned_int8_spmm(plan, *operands.values())


PRODUCTS = (
    Product(
        "spmm",
        lambda p, batch, draw: {"values": draw((p.nnz,)), "x": draw((batch, p.shape[1]))},
        _spmm,
        lambda p, batch: p.row_counts,
    ),
    Product(
        "spmm with bias",
        lambda p, batch, draw: {
            "values": draw((p.nnz,)),
            "x": draw((batch, p.shape[1])),
            "bias": draw((p.shape[0],)),
        },
        _spmm,
        lambda p, batch: p.row_counts,
    ),
    Product(
        "spmm feature-major",
        lambda p, batch, draw: {"values": draw((p.nnz,)), "x": draw((p.shape[1], batch)).t()},
        _spmm,
        lambda p, batch: p.row_counts,
    ),
    Product(
        "planned spmm",
        lambda p, batch, draw: {"values": draw((p.nnz,)), "x": draw((batch, p.shape[1]))},
        _planned_spmm,
        lambda p, batch: p.row_counts,
    ),
    Product(
        "planned spmm with bias, feature-major",
        lambda p, batch, draw: {
            "values": draw((p.nnz,)),
            "x": draw((p.shape[1], batch)).t(),
            "bias": draw((p.shape[0],)),
        },
        _planned_spmm,
        lambda p, batch: p.row_counts,
    ),
    Product(
        "planned spmm with bias, feature-major result",
        lambda p, batch, draw: {
            "values": draw((p.nnz,)),
            "x": draw((batch, p.shape[1])),
            "bias": draw((p.shape[0],)),
        },
        _feature_major_spmm,
        lambda p, batch: p.row_counts,
    ),
    Product(
        "planned spmm of the transpose",
        lambda p, batch, draw: {"values": draw((p.nnz,)), "x": draw((batch, p.shape[0]))},
        _transposed_spmm,
        lambda p, batch: p.transpose().crow_indices.diff(),
    ),
    Product(
        "bitmap spmm with bias",
        lambda p, batch, draw: {
            "values": draw((p.nnz,)),
            "x": draw((batch, p.shape[1])),
            "bias": draw((p.shape[0],)),
        },
        _bitmap_spmm,
        lambda p, batch: p.row_counts,
    ),
    Product(
        "bitmap spmm feature-major",
        lambda p, batch, draw: {"values": draw((p.nnz,)), "x": draw((p.shape[1], batch)).t()},
        _bitmap_spmm,
        lambda p, batch: p.row_counts,
    ),
    # Of a row's terms, two more roundings: by the scale, and when the bias is added.
    Product(
        "bitmap int8 spmm with bias",
        lambda p, batch, draw: {
            **_int8_operands(p, draw),
            "x": draw((batch, p.shape[1])),
            "bias": draw((p.shape[0],)),
        },
        _bitmap_int8_spmm,
        lambda p, batch: p.row_counts + 2,
    ),
    Product(
        "bitmap int8 spmm feature-major",
        lambda p, batch, draw: {**_int8_operands(p, draw), "x": draw((p.shape[1], batch)).t()},
        _bitmap_int8_spmm,
        lambda p, batch: p.row_counts + 2,
    ),
    Product(
        "filled int8 spmm with bias",
        lambda p, batch, draw: {
            **_int8_operands(p, draw),
            "x": draw((batch, p.shape[1])),
            "bias": draw((p.shape[0],)),
        },
        _filled_int8_spmm,
        lambda p, batch: p.row_counts + 2,
    ),
    Product(
        "filled int8 spmm feature-major",
        lambda p, batch, draw: {**_int8_operands(p, draw), "x": draw((p.shape[1], batch)).t()},
        _filled_int8_spmm,
        lambda p, batch: p.row_counts + 2,
    ),
    Product(
        "planned int8 spmm with bias",
        lambda p, batch, draw: {
            **_int8_operands(p, draw),
            "x": draw((batch, p.shape[1])),
            "bias": draw((p.shape[0],)),
        },
        _planned_int8_spmm,
        lambda p, batch: p.row_counts + 2,
    ),
    Product(
        "bitmap dx",
        lambda p, batch, draw: {"values": draw((p.nnz,)), "dy": draw((batch, p.shape[0]))},
        lambda backend, p, operands: backend.bitmap_dx(_bitmap(backend, p), **operands),
        lambda p, batch: p.transpose().crow_indices.diff(),
    ),
    Product(
        "bitmap dvalues feature-major",
        lambda p, batch, draw: {"dy": draw((p.shape[0], batch)).t(), "x": draw((p.shape[1], batch)).t()},
        lambda backend, p, operands: backend.bitmap_dvalues(_bitmap(backend, p), **operands),
        lambda p, batch: torch.tensor(batch),
    ),
    Product(
        "expand",
        lambda p, batch, draw: {"values": draw((p.nnz,))},
        lambda backend, p, operands: backend.expand(_bitmap(backend, p), **operands),
        lambda p, batch: torch.tensor(0),
    ),
    Product(
        "compress",
        lambda p, batch, draw: {"dense": draw(p.shape)},
        lambda backend, p, operands: backend.compress(_bitmap(backend, p), **operands),
        lambda p, batch: torch.tensor(0),
    ),
    Product(
        "sddmm",
        lambda p, batch, draw: {"dy": draw((batch, p.shape[0])), "x": draw((batch, p.shape[1]))},
        _sddmm,
        lambda p, batch: torch.tensor(batch),
    ),
    Product(
        "sddmm feature-major",
        lambda p, batch, draw: {"dy": draw((p.shape[0], batch)).t(), "x": draw((p.shape[1], batch)).t()},
        _sddmm,
        lambda p, batch: torch.tensor(batch),
    ),
    Product(
        "tiled sddmm",
        lambda p, batch, draw: {"dy": draw((batch, p.shape[0])), "x": draw((batch, p.shape[1]))},
        _tiled_sddmm,
        lambda p, batch: torch.tensor(batch),
    ),
    Product(
        "tiled sddmm feature-major",
        lambda p, batch, draw: {"dy": draw((p.shape[0], batch)).t(), "x": draw((p.shape[1], batch)).t()},
        _tiled_sddmm,
        lambda p, batch: torch.tensor(batch),
    ),
    Product(
        "filled spmm with bias",
        lambda p, batch, draw: {
            "values": draw((p.nnz,)),
            "x": draw((batch, p.shape[1])),
            "bias": draw((p.shape[0],)),
        },
        _filled_spmm,
        lambda p, batch: p.row_counts,
    ),
    Product(
        "filled spmm feature-major",
        lambda p, batch, draw: {"values": draw((p.nnz,)), "x": draw((p.shape[1], batch)).t()},
        _filled_spmm,
        lambda p, batch: p.row_counts,
    ),
    Product(
        "filled spmm with bias, feature-major result",
        lambda p, batch, draw: {
            "values": draw((p.nnz,)),
            "x": draw((batch, p.shape[1])),
            "bias": draw((p.shape[0],)),
        },
        _feature_major_filled_spmm,
        lambda p, batch: p.row_counts,
    ),
    Product(
        "filled dx",
        lambda p, batch, draw: {"values": draw((p.nnz,)), "dy": draw((batch, p.shape[0]))},
        lambda backend, p, operands: backend.filled_dx(_bitmap(backend, p), **operands),
        lambda p, batch: p.transpose().crow_indices.diff(),
    ),
    Product(
        "filled dvalues",
        lambda p, batch, draw: {"dy": draw((batch, p.shape[0])), "x": draw((batch, p.shape[1]))},
        lambda backend, p, operands: backend.filled_dvalues(_bitmap(backend, p), **operands),
        lambda p, batch: torch.tensor(batch),
    ),
    Product(
        "filled dvalues feature-major",
        lambda p, batch, draw: {"dy": draw((p.shape[0], batch)).t(), "x": draw((p.shape[1], batch)).t()},
        lambda backend, p, operands: backend.filled_dvalues(_bitmap(backend, p), **operands),
        lambda p, batch: torch.tensor(batch),
    ),
    *(
        Product(
            f"all gradients at once, {dx} and {dvalues}, {layout}", draw, _backward(dx, dvalues), _terms_of_gradients
        )
        for dx, dvalues in (
            *((dx, dvalues) for dx in ("bucketed", "filled") for dvalues in ("tiled", "filled")),
            ("bitmap", "bitmap"),
            ("bitmap", "filled"),
            ("filled", "bitmap"),
        )
        for layout, draw in (("token-major", _token_major), ("feature-major", _feature_major))
    ),
)
