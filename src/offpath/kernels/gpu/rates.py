"""How fast a device moves, gathers and multiplies: from its properties, and better by a short measurement."""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.functional import linear

from offpath.kernels.gpu import availability, expand, sparse_weight
from offpath.kernels.measured import measured_once
from offpath.kernels.precision import float32_precision

_log = logging.getLogger("offpath")
# A weight that leaves the cache, with as few connections as gathering is for, and tokens enough for the device.
SIZE, DENSITY, TOKENS, FEW = 4096, 0.05, 2048, 8
ROUNDS, CALLS = 5, 4
# What keeps the device busy for about a millisecond.
BUSY_BYTES, BUSY_WRITES = 2**28, 10
# Multiply-adds of a clock and multiprocessor on tensor cores in bfloat16, by compute capability (NVIDIA's whitepapers
# of each architecture); of CUDA cores in float32; in float64 of whichever are more, which consumer cards have few of.
TENSOR_CORES = {(8, 0): 1024, (9, 0): 2048, (10, 0): 4096, (10, 3): 4096}
FEWEST_TENSOR_CORES = 512
CUDA_CORES = {(8, 0): 64}
DOUBLE_CORES = {(8, 0): 64, (9, 0): 128, (10, 0): 64}
FEWEST_DOUBLE_CORES = 2
# What real kernels reach of what a device could do.
REACHED = 0.7
# CU_DEVICE_ATTRIBUTE_CLOCK_RATE, _MEMORY_CLOCK_RATE (both in kHz) and _GLOBAL_MEMORY_BUS_WIDTH (bits).
_CLOCK, _MEMORY_CLOCK, _BUS_WIDTH = 13, 36, 37


@dataclass(frozen=True)
class Rates:
    """Seconds of a kernel that does nothing, and what goes through a device in a second, in one dtype.

    `few_connections` and `few_dots` are connections of one token, in the product and in the gradient of the values;
    `few_share` is what one more token costs beside the first, where there are few. `launch_seconds` is what a launch
    of Triton's takes the host: of a product that is done sooner, nothing else matters.
    """

    element_bytes: int
    cache_bytes: int
    call_seconds: float
    moved_bytes: float  # read and written
    dense_flops: float
    gathered_elements: float
    dotted_elements: float
    few_connections: float
    few_dots: float
    few_share: float
    expanded_positions: float
    launch_seconds: float


def rates_here(dtype: torch.dtype) -> Rates:
    """The rates of the current device: measured once, or calculated while a CUDA graph is being captured.

    Float32 has rates for each precision that torch is allowed to multiply it in.
    """
    device = torch.cuda.current_device()
    precision = float32_precision("cuda") if dtype is torch.float32 else ""
    if torch.cuda.is_current_stream_capturing() and (device, dtype, precision) not in _known:
        return calculated(device, dtype, precision)
    return _rates(device, dtype, precision)


_known: set[tuple[int, torch.dtype, str]] = set()


@cache
def _rates(device: int, dtype: torch.dtype, precision: str) -> Rates:
    try:
        facts = [*availability.facts(device), precision, SIZE, DENSITY, TOKENS]
        found = measured_once("gpu", "gpu", dtype, facts, is_complete, lambda: asdict(measure(device, dtype)))
        rates = Rates(**found)
    except torch.OutOfMemoryError:
        _log.warning("offpath calculates what its products cost on the GPU: there is no memory left to measure it")
        rates = calculated(device, dtype, precision)
    _known.add((device, dtype, precision))
    return rates


def is_complete(found: Any) -> bool:
    """Whether a file holds rates."""
    names = set(Rates.__dataclass_fields__)
    return isinstance(found, dict) and set(found) == names and all(n > 0 for n in found.values())


def calculated(device: int, dtype: torch.dtype, precision: str = "ieee") -> Rates:
    """What the properties of a device let one expect."""
    properties = torch.cuda.get_device_properties(device)
    clock = 1e3 * _attribute(device, _CLOCK, 1_500_000)
    bandwidth = 2e3 * _attribute(device, _MEMORY_CLOCK, 1_000_000) * _attribute(device, _BUS_WIDTH, 2048) / 8
    capability = properties.major, properties.minor
    cycles = clock * properties.multi_processor_count
    tensor_cores = TENSOR_CORES.get(capability, FEWEST_TENSOR_CORES)
    lanes = CUDA_CORES.get(capability, 128)
    multiply_adds = {
        torch.bfloat16: tensor_cores,
        torch.float64: DOUBLE_CORES.get(capability, FEWEST_DOUBLE_CORES),
    }.get(dtype, lanes)
    if dtype is torch.float32 and precision != "ieee":
        multiply_adds = tensor_cores // 2
    gathered = REACHED / 2 * cycles * 128 / dtype.itemsize  # half of what a first-level cache could give
    few = REACHED * min(bandwidth / (4 + dtype.itemsize), cycles * lanes / 24)
    return Rates(
        element_bytes=dtype.itemsize,
        cache_bytes=properties.L2_cache_size,
        call_seconds=2.5e-6,
        moved_bytes=REACHED * bandwidth,
        dense_flops=2 * REACHED * cycles * multiply_adds,
        gathered_elements=gathered,
        dotted_elements=gathered,
        few_connections=few,
        few_dots=few,
        few_share=0.5,
        expanded_positions=REACHED * bandwidth / (dtype.itemsize + 0.25),
        launch_seconds=25e-6,
    )


@torch.autocast("cuda", enabled=False)  # or torch's product would be timed in another dtype, and kept
@torch.inference_mode()
def measure(device: int, dtype: torch.dtype) -> Rates:
    """Time each kind of work in turns, and keep the best times; takes a few seconds, most of them compiling."""
    _log.info("offpath measures once what its %s products cost on the GPU; this takes seconds", dtype)
    generator = torch.Generator(torch.device("cuda", device)).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=generator.device).to(dtype)

    mask = torch.rand(SIZE, SIZE, generator=generator, device=generator.device) < DENSITY
    crow_indices = torch.zeros(SIZE + 1, dtype=torch.int32, device=mask.device)
    crow_indices[1:] = mask.sum(1).cumsum(0)
    col_indices = mask.nonzero()[:, 1].int()
    del mask
    nnz = col_indices.numel()
    values, x, weight, nothing = drawn(nnz), drawn(TOKENS, SIZE), drawn(SIZE, SIZE), drawn(1)
    bitmap = expand.bitmap(crow_indices, col_indices, SIZE)
    csr = crow_indices, col_indices, values
    best = _best_seconds(
        {
            "nothing": lambda: nothing.add_(0),
            "move": weight.clone,
            "dense": lambda: linear(x, weight),
            "gather": lambda: sparse_weight.spmm(*csr, x),
            "dot": lambda: sparse_weight.sddmm(crow_indices, col_indices, x, x),
            "one": lambda: sparse_weight.spmm(*csr, x[:1]),
            "one dot": lambda: sparse_weight.sddmm(crow_indices, col_indices, x[:1], x[:1]),
            "few": lambda: sparse_weight.spmm(*csr, x[:FEW]),
            "expand": lambda: expand.expand(bitmap, values),
        }
    )
    call = best["nothing"]

    def rate(work: float, name: str) -> float:
        return work / max(best[name] - call, best[name] / 4)

    one = max(best["one"] - call, best["one"] / 4)
    return Rates(
        element_bytes=dtype.itemsize,
        cache_bytes=torch.cuda.get_device_properties(device).L2_cache_size,
        call_seconds=call,
        moved_bytes=rate(2 * weight.nbytes, "move"),
        dense_flops=rate(2 * SIZE * SIZE * TOKENS, "dense"),
        gathered_elements=rate(nnz * TOKENS, "gather"),
        dotted_elements=rate(nnz * TOKENS, "dot"),
        few_connections=nnz / one,
        few_dots=rate(nnz, "one dot"),
        few_share=max((best["few"] - best["one"]) / one / (FEW - 1), 1e-3),
        expanded_positions=rate(SIZE * SIZE, "expand"),
        launch_seconds=_host_seconds(lambda: sparse_weight.spmm(*csr, x[:1])),
    )


def _best_seconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """On the device alone: it is kept busy until all calls of a round have been launched."""
    busy = torch.empty(BUSY_BYTES, dtype=torch.uint8, device="cuda")
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(1 + ROUNDS):
        for name, call in calls.items():
            call()  # the first one compiles
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(BUSY_WRITES):
                busy.zero_()
            before.record()
            for _ in range(CALLS):
                call()
            after.record()
            after.synchronize()
            best[name] = min(best[name], before.elapsed_time(after) / CALLS / 1e3)
    return best


def _host_seconds(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, (time.perf_counter() - start) / CALLS)
    return best


def _attribute(device: int, which: int, otherwise: int) -> int:
    found = ctypes.c_int(0)
    status = ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(found), which, device)
    return found.value if status == 0 and found.value > 0 else otherwise
