"""What the arithmetic instructions of PTX compute, for all threads of a launch at once: arrays of one entry a thread.

Operands are already of the instruction's type.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray
Function = Callable[..., Array]


_TYPES = {
    f"{kind}{bits}": np.dtype(f"{as_}{bits // 8}") for kind, as_ in ("bu", "uu", "si") for bits in (8, 16, 32, 64)
}
_TYPES |= {
    "bf16": np.dtype(np.uint16),  # its bits
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "pred": np.dtype(bool),
}


def numpy_type(name: str) -> np.dtype:
    """A PTX type as numpy's. Raises `KeyError` for types that no kernel of ours has."""
    return _TYPES[name]


def widen_bfloat16(a: Array) -> Array:
    return (a.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow_to_bfloat16(a: Array) -> Array:
    """To the nearest, ties to even; every NaN becomes 0x7FFF, as the instruction has it."""
    bits = a.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(a), np.uint16(0x7FFF), rounded.astype(np.uint16))


def _divided(a: Array, b: Array) -> Array:
    """Towards zero; by zero, anything."""
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, np.ones_like(b), b)
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient) if a.dtype.kind == "i" else quotient


def _remainder(a: Array, b: Array) -> Array:
    return a - _divided(a, b) * b


def _shifted_left(a: Array, count: Array) -> Array:
    bits = a.dtype.itemsize * 8
    return np.where(count >= bits, a.dtype.type(0), a << np.minimum(count, bits - 1).astype(a.dtype))


def _shifted_right(a: Array, count: Array) -> Array:
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count >= bits, a.dtype.type(0), shifted)


def _field(a: Array, first: Array, length: Array) -> Array:
    """`length` bits from `first` on, with the sign of the last one where a has a sign; of 32 bits."""
    first, length = first & np.uint32(255), length & np.uint32(255)
    wide = a.astype(np.int64 if a.dtype.kind == "i" else np.uint64)
    left = (64 - np.minimum(first.astype(np.int64) + length, 32)).astype(wide.dtype)
    kept = (wide << left) >> left >> np.minimum(first, 63).astype(wide.dtype)
    return np.where(length == 0, 0, kept).astype(a.dtype)


def _bits_put(a: Array, b: Array, first: Array, length: Array) -> Array:
    """The lower `length` bits of a, in place of those of b from `first` on; of 32 bits."""
    first, length = (np.minimum(n & np.uint32(255), 32).astype(np.uint64) for n in (first, length))
    mask = ((np.uint64(1) << length) - np.uint64(1) << first).astype(np.uint32)
    return b & ~mask | (a.astype(np.uint64) << first).astype(np.uint32) & mask


def _bytes_picked(a: Array, b: Array, selector: Array) -> Array:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for place in range(4):
        nibble = selector >> np.uint32(4 * place) & np.uint32(15)
        byte = (both >> (8 * (nibble & np.uint32(7))).astype(np.uint64) & np.uint64(255)).astype(np.uint32)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result |= np.where(nibble & np.uint32(8), sign, byte) << np.uint32(8 * place)
    return result


def logic(a: Array, b: Array, c: Array, table: int) -> Array:
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def larger(a: Array, b: Array) -> Array:
    return np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b)


def smaller(a: Array, b: Array) -> Array:
    return np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b)


# By the instruction's name; the operands and the result are of its type.
PLAIN: dict[str, Function] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    # A product of two float32 is exact in float64: rounded twice, which small integers are not.
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(a.dtype),
    "mad": lambda a, b, c: a * b + c,
    "div": _divided,
    "rem": _remainder,
    "max": larger,
    "min": smaller,
    "neg": lambda a: -a,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "shl": _shifted_left,
    "shr": _shifted_right,
    "bfe": _field,
    "bfi": _bits_put,
    "prmt": _bytes_picked,
    "popc": lambda a: np.unpackbits(np.ascontiguousarray(a[:, None]).view(np.uint8), axis=1).sum(1, dtype=np.uint32),
}
# Types of two numbers in one register: that of each.
PAIRS = {
    "f16x2": np.dtype(np.float16),
    "s16x2": np.dtype(np.int16),
    "u16x2": np.dtype(np.uint16),
    "f32x2": np.dtype(np.float32),
}

_COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def compare(how: str, a: Array, b: Array) -> Array:
    """`setp`: for floats, `ne` and the others are false of a NaN, and those that end in u are true of it."""
    if a.dtype.kind != "f":
        return _COMPARISONS[how](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if how in ("nan", "num"):
        return unordered if how == "nan" else ~unordered
    if how.endswith("u"):
        return _COMPARISONS[how[:-1]](a, b) | unordered
    return _COMPARISONS[how](a, b) & ~unordered


def convert(a: Array, target: str, source: str, modifiers: tuple[str, ...]) -> Array:
    """`cvt`, between numbers of one kind or of two."""
    if source == "bf16":
        a = widen_bfloat16(a)
    if target == "bf16":
        return narrow_to_bfloat16(a.astype(np.float32))
    to = numpy_type(target)
    if to.kind == "f" or a.dtype.kind != "f":
        return a.astype(to)
    assert "rzi" in modifiers, modifiers
    limits = np.iinfo(to)
    inside = np.clip(np.trunc(np.nan_to_num(a.astype(np.float64), nan=0.0)), limits.min, limits.max)
    return inside.astype(to)
