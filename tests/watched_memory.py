"""What Triton's interpreter does not notice: reads and writes outside of a kernel's operands, and races.

The interpreter runs one program after another, each like a single thread. On a GPU, programs run at the same time, and
the threads of one see what another of them wrote to an operand only behind a barrier, of which our kernels have none.
So in each launch, every element is watched: it may be read by many programs, or read and then written by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime import InterpreterError, interpreter

_NOBODY, _MANY = -1, -2


class _Launch:
    """The elements of a launch's operands, by address, and which programs have read and written each of them."""

    def __init__(self, operands: Iterable[Tensor]) -> None:
        self.addresses = np.unique(np.concatenate([np.zeros(0, np.uint64), *map(addresses_of, operands)]))
        self.reader = np.full(self.addresses.size, _NOBODY)
        self.writer = np.full(self.addresses.size, _NOBODY)
        self.fault = ""

    def read(self, addresses: np.ndarray) -> None:
        places, program = self._places(addresses, "reads"), _program()
        self.expect(self.writer[places] == _NOBODY, f"program {program} reads what a program has written")
        alone = (self.reader[places] == _NOBODY) | (self.reader[places] == program)
        self.reader[places] = np.where(alone, program, _MANY)

    def write(self, addresses: np.ndarray) -> None:
        places, program = self._places(addresses, "writes"), _program()
        self.expect(np.unique(places).size == places.size, f"threads of program {program} write to the same place")
        for others, have in ((self.writer[places], "written"), (self.reader[places], "read")):
            mine = (others == _NOBODY) | (others == program)
            self.expect(mine, f"program {program} writes what another one has {have}")
        self.writer[places] = program

    def _places(self, addresses: np.ndarray, does: str) -> np.ndarray:
        places = np.searchsorted(self.addresses, addresses)
        inside = np.append(self.addresses, np.uint64(0))[places] == addresses
        self.expect(inside, f"program {_program()} {does} outside of its operands")
        return places

    def expect(self, fine: bool | np.ndarray, fault: str) -> None:
        if not np.all(fine):
            self.fault = fault
            raise AssertionError(fault)


def addresses_of(tensor: Tensor) -> np.ndarray:
    """Of each element, without an operation of torch: the tests count those."""
    places = np.zeros(1, np.int64)
    for count, step in zip(tensor.shape, tensor.stride(), strict=True):
        places = np.unique(places[:, None] + np.arange(count) * step)
    return (tensor.data_ptr() + places * tensor.element_size()).astype(np.uint64)


def _live(pointers: Any, mask: Any) -> np.ndarray:
    return pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]


def _program() -> int:
    (x, y, z), (_, ys, zs) = interpreter.interpreter_builder.grid_idx, interpreter.interpreter_builder.grid_dim
    return (x * ys + y) * zs + z


def watch() -> None:
    """From now on, a launch raises an AssertionError where its kernel does what it must not."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, run = builder.create_masked_load, builder.create_masked_store, executor.__call__
    launches: list[_Launch] = []

    def watched_load(self: Any, pointers: Any, mask: Any, *options: Any) -> Any:
        launches[-1].read(_live(pointers, mask))
        return load(self, pointers, mask, *options)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *options: Any) -> Any:
        launches[-1].write(_live(pointers, mask))
        return store(self, pointers, value, mask, *options)

    def refused(*_: Any) -> Any:
        launches[-1].expect(False, f"program {_program()} adds atomically, in any order")

    def watched_run(self: Any, *arguments: Any, **options: Any) -> None:
        launches.append(_Launch(argument for argument in arguments if isinstance(argument, Tensor)))
        try:
            run(self, *arguments, **options)
        except InterpreterError as error:
            if launches[-1].fault:
                raise AssertionError(f"{self.fn.__name__}: {launches[-1].fault}") from error
            raise
        finally:
            launches.pop()

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    builder.create_atomic_rmw = builder.create_atomic_cas = refused
    executor.__call__ = watched_run
