"""What each launch asks of the driver, without a GPU: `test_gpu_launch.py` starts this in a process of its own.

The driver is the benchmarks' stand-in. Triton compiles and launches as for a GPU, and results mean nothing.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

import gpu_host
import standin
from offpath.kernels import KernelError
from offpath.kernels.gpu import (
    counting_sort,
    densely,
    driver as cuda,
    expand,
    few_tokens,
    gather,
    launch as launching,
    sparse_weight,
    ties,
)

LAUNCHERS = counting_sort, densely, expand, few_tokens, gather, sparse_weight, ties
ARGUMENT_BYTES = {"i32": 4, "i64": 8}  # and 8 of an address
ROWS = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 2, 1, 2, 3], dtype=torch.int32)
# What Triton makes kernels of their own for, and what is beside it.
WHOLE_NUMBERS = 0, 1, 2, 15, 16, 17, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, 2**40, 2**40 + 1
CONSTANTS = {"HAS_BIAS": True, "ACCUMULATOR": tl.float32, "TRUSTED": True, "WHOLE": False, "UNROLL": 8, "BLOCK": 32}
DTYPES = torch.float32, torch.bfloat16, torch.float64


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> standin.Driver:
    return standin.install(tmp_path_factory.mktemp("driver"))


def _call_every_launcher(dtype: torch.dtype) -> None:
    values, weight, wide = torch.ones(5, dtype=dtype), torch.ones(4, 33, dtype=dtype), torch.ones(2, 33, dtype=dtype)
    for tokens in (1, 16, 18):
        x, dy = torch.ones(tokens, 4, dtype=dtype), torch.ones(tokens, 2, dtype=dtype)
        sparse_weight.spmm(*ROWS, values, x, dy[0])
        sparse_weight.sddmm(*ROWS, dy, x)
    bits = expand.bitmap(*ROWS, 4)
    expand.compress(bits, expand.expand(bits, values))
    gather.matmul(*ROWS, values, weight)
    gather.dots(*ROWS, wide, weight)
    counting_sort.weight_gradient(*ROWS, values, wide, 4)
    counting_sort.row_gradients(*ROWS, values, wide, weight)
    counting_sort.encoder_gradients(*ROWS, values, wide, 4)
    densely.written_out(*ROWS, values, 4)
    ties.take_first_of_equals(wide, weight[:2, :4], torch.zeros(2, 3, dtype=torch.int64))


def test_a_kernel_that_is_remembered_is_given_what_triton_gives_it(
    driver: standin.Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = set()

    def checked(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_stages: int = 1, **rest: Any) -> None:
        options = {"num_warps": rest.pop("num_warps"), "num_stages": num_stages}  # Triton minds their order
        launching.launch(kernel, grid, *arguments, **rest, **options)  # compiles, and remembers
        remembered = len(launching._compiled)
        compiled = kernel[grid](*arguments, **rest, **options)
        sizes = [ARGUMENT_BYTES.get(kind, 8) for kind in compiled.src.signature.values() if kind != "constexpr"]
        by_triton = driver.launch_of(lambda: kernel[grid](*arguments, **rest, **options), sizes)
        ours = driver.launch_of(lambda: launching.launch(kernel, grid, *arguments, **rest, **options), sizes)
        assert ours == by_triton and ours.stream == standin.STREAM
        assert len(launching._compiled) == remembered
        launched.add(kernel.__name__)

    for launcher in LAUNCHERS:
        monkeypatch.setattr(launcher, "launch", checked)
    for dtype in DTYPES[:2]:
        _call_every_launcher(dtype)
    assert launched == {name for launcher in LAUNCHERS for name in vars(launcher) if name.endswith("_kernel")}


class _Compiled(CompiledKernel):
    """What Triton would have compiled: it writes down that it ran, and with what."""

    def __init__(self, ran: list[tuple[object, ...]]) -> None:
        self.module, self.function, self.packed_metadata = object(), 0, ()
        self.name, self.src = "kernel", None
        # Grid, stream, function, what the metadata and two hooks are, and then the kernel's arguments.
        self._run = lambda *arguments: ran.append((self, arguments[:3], arguments[9:]))

    def __del__(self) -> None:
        """There is no module to unload, which Triton does from 3.8 on."""


@dataclass(frozen=True)
class Call:
    """Of a kernel with two vectors of indices, four of another dtype, and five whole numbers."""

    numbers: tuple[int, ...] = (64, 64, 64, 64, 64)
    offsets: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    dtype: torch.dtype = torch.float32
    has_bias: bool = True
    block: int = 32
    num_warps: int = 1
    num_stages: int = 1


def _calls() -> Iterator[Call]:
    """Each differs in one thing from one before it."""
    for base in (Call(), Call(numbers=(1, 17, 2**31, 16, 64), offsets=(0, 1, 0, 4, 1, 0), dtype=torch.bfloat16)):
        yield base
        for place in range(5):
            yield from (replace(base, numbers=_with(base.numbers, place, number)) for number in WHOLE_NUMBERS)
        for place in range(6):
            yield from (replace(base, offsets=_with(base.offsets, place, offset)) for offset in (0, 1, 4))
        yield from (replace(base, dtype=dtype) for dtype in DTYPES)
        yield replace(base, has_bias=False)
        yield replace(base, block=64)
        yield replace(base, num_warps=4)
        yield replace(base, num_stages=2)


def _with(numbers: tuple[int, ...], place: int, number: int) -> tuple[int, ...]:
    return (*numbers[:place], number, *numbers[place + 1 :])


def _check_what_is_remembered(module: ModuleType) -> None:
    """That `module.launch` runs the kernel that Triton would, for whatever it may make kernels of their own."""
    ran: list[tuple[Any, ...]] = []
    kernel = gather.gather_sum_kernel

    def make(kernel: Any, key: object, *_: object) -> _Compiled:
        return kernel.device_caches[0][0].setdefault(key, _Compiled(ran))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "_do_compile", make)
        patch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
        patch.setattr(module, "_compiled", {})
        for call in _calls():
            dtypes = [torch.int32] * 2 + [call.dtype] * 4
            tensors = [torch.zeros(32, dtype=of)[offset:] for of, offset in zip(dtypes, call.offsets, strict=True)]
            constants = {**CONSTANTS, "HAS_BIAS": call.has_bias, "BLOCK": call.block}
            options = {"num_warps": call.num_warps, "num_stages": call.num_stages}
            everything = kernel, (3, 2), *tensors, *call.numbers
            ran.clear()
            module.launch(*everything, **constants, **options)
            remembered = len(module._compiled)
            module.launch(*everything, **constants, **options)
            assert len(module._compiled) == remembered
            kernel[3, 2](*everything[2:], **constants, **options)
            (first, *_), (second, grid, passed), (right, right_grid, arguments) = ran
            assert first is second is right and grid == right_grid, call
            assert not any(isinstance(one, torch.Tensor) for one in passed), "Triton was asked again"
            assert passed == tuple(one.data_ptr() if isinstance(one, torch.Tensor) else one for one in arguments)
        assert len(module._compiled) == len(kernel.device_caches[0][0]), "as many as Triton has, and no more"


def test_what_is_remembered_is_what_triton_would_run(driver: standin.Driver) -> None:
    _check_what_is_remembered(launching)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(value & 15 == 0)", "0"),
        ("2 if value == 1 else", ""),
        ("(value > _MOST_INT32) * 4", "0"),
        ("key.append(argument.dtype)", "pass"),
        ("num_warps, num_stages, *constants.values()", "*constants.values()"),
        ("*constants.values()]", "]"),
        ("(*values, *constants.values())", "(*values[::-1], *constants.values())"),
        ("(*grid, 1, 1)[:3]", "(*grid[::-1], 1)"),
        ("found = _compiled.get(tuple(key))", "found = None"),
    ],
)
def test_a_mutant_is_rejected(driver: standin.Driver, old: str, new: str) -> None:
    source = Path(launching.__file__).read_text()
    assert source.count(old) == 1
    mutant = ModuleType("mutant")
    mutant.__dict__["__name__"] = launching.__name__  # annotations are looked up there
    exec(compile(source.replace(old, new), "mutant", "exec"), vars(mutant))
    with pytest.raises((AssertionError, TypeError)):
        _check_what_is_remembered(mutant)


def test_another_triton_is_asked_every_time(driver: standin.Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    ask = launching._launch_by_triton
    monkeypatch.setattr(launching, "_launch_by_triton", lambda *call: (asked.append(call), ask(*call))[1])
    for remembered, times in ((True, 1), (False, 3)):
        monkeypatch.setattr(launching, "_REMEMBERED", remembered)
        monkeypatch.setattr(launching, "_compiled", {})
        asked.clear()
        for _ in range(3):
            sparse_weight.transpose(torch.zeros(4, 16), torch.zeros(16, 16))
        assert len(asked) == times


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), True),
        (subprocess.CalledProcessError(1, ["gcc"]), True),  # Python.h is missing
        (RuntimeError("CUDA error: an illegal memory access"), False),
    ],
)
def test_what_triton_lacks_to_build_its_launcher_is_named(error: Exception, refused: bool) -> None:
    class Kernel:
        fn, arg_names = None, ["x"]

        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return self

        def __call__(self, *arguments: object, **options: object) -> None:
            raise error

    expected = KernelError if refused else type(error)
    with pytest.raises(expected, match="expected a C compiler and Python's headers" if refused else "illegal"):
        launching.launch(Kernel(), (1,), torch.zeros(1), num_warps=1)


def test_a_kernel_runs_where_its_tensors_are(driver: standin.Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    current = [1]
    entered = []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        entered.append(index)
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    x, y = torch.zeros(4, 16), torch.zeros(16, 16)
    launches = driver.last.count
    sparse_weight.transpose(x, y)
    assert entered == [0] and current == [1] and driver.last.count == launches + 1


def test_our_own_launches(driver: standin.Driver) -> None:
    kernel = cuda.load("decode.cu", "decode", torch.device("cuda", 0), BATCH=1)
    arguments = 2**63 + 5, 0, 2**31 - 1, 7
    made = driver.launch_of(lambda: kernel.launch((5, 3), 96, 1024, *arguments), [8, 8, 4, 4])
    assert made.grid == (5, 3, 1) and (made.threads, made.shared_bytes, made.stream) == (96, 1024, standin.STREAM)
    assert made.arguments == arguments and made.attribute_count == kernel.overlaps == 1
    assert made.function == kernel.function.value
    assert driver.last.pushed == 0
    elsewhere = replace(kernel, context=ctypes.c_void_p(kernel.context.value + 16), overlaps=False)
    made = driver.launch_of(lambda: elsewhere.launch((1, 1), 32, 0, *arguments), [8] * 4)
    assert made.attribute_count == 0 and (driver.last.pushed, driver.last.popped) == (1, 1)


@pytest.mark.filterwarnings("ignore:CUDA initialization")  # by a torch that is built for CUDA, from the stand-in
def test_the_benchmark_of_the_host_runs(driver: standin.Driver) -> None:
    table = gpu_host.table(driver, rounds=1, sample_seconds=0.0)
    launches = dict(zip(*(list(column.cells) for column in table.columns[:2]), strict=True))
    # One product of a few tokens, and two gradients; of more, each turns its operands and its result.
    assert launches["SparseLinear row-wise, 1 token, step"] == "3"
    assert launches["SparseLinear row-wise, 16 tokens, step"] == "8"
    assert launches["SparseLinear dense, 16 tokens, step"] == "2"
    assert launches["PackedSparseLinear, 1 token, inference"] == "1"
    assert launches["SparseInputLinear, 1 token, inference"] == "2"
