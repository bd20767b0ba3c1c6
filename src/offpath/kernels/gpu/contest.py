"""Whether a product of a few tokens is faster than torch's dense one: measured on the device, shape by shape."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from offpath.kernels.errors import KernelError
from offpath.kernels.gpu.availability import facts, nvrtc_part, problem
from offpath.kernels.gpu.decode import MAX_TOKENS, decode
from offpath.kernels.gpu.formats import Packed
from offpath.kernels.gpu.live import DTYPES, live_matmul
from offpath.kernels.gpu.tensor_cores import multiply_tiles
from offpath.kernels.gpu.tiles import Tiles
from offpath.kernels.measured import measured_once
from offpath.kernels.precision import float32_precision

ROUNDS = 9
# What the packed product must be faster by, so that a disturbed measurement loses nothing to speak of; and what one
# that skips zeros may be slower by where there are none.
MARGIN = 1.03
# What is written before each call so that no weight is still in the second-level cache, in sizes of that cache. It
# also keeps the device busy until both events and the kernels between them have been launched: of tiles, that may take
# the host nearly as long as one such write takes the device, by calculation, so there are two.
CACHES, WRITES = 4, 2


@torch.inference_mode()
def tokens_that_pay(packed: Packed, tiles: Tiles | None, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """Up to how many tokens decoding `packed`, and from there on multiplying `tiles`, beats everything else.

    `weight` [rows, columns] is their dense equal. The second count is 0 where the tiles never won. Takes milliseconds.
    Raises `KernelError` unless all are on an NVIDIA GPU whose kernels can run.
    """
    if not weight.is_cuda:
        raise KernelError(
            f"expected a weight on an NVIDIA GPU, where its packed form is read, got one on {weight.device}; move the "
            "layer there first"
        )
    decoded = tiled = 0
    for tokens in (1, 2, 4, 8, 16, 32, 64):
        x = torch.ones(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)
        calls = {"dense": partial(linear, x, weight, bias)}
        if tokens <= MAX_TOKENS and not tiled:
            calls["decoded"] = partial(decode, packed, x, bias)
        if tiles is not None:
            calls["tiled"] = partial(multiply_tiles, tiles, x, bias)
        if len(calls) == 1:
            break
        seconds = dict(zip(calls, cold_seconds(list(calls.values()), weight.device), strict=True))
        limit = seconds.pop("dense") / MARGIN
        best = min(seconds, key=lambda name: seconds[name])
        if seconds[best] > limit:
            break
        if best == "decoded":
            decoded = tokens
        else:
            tiled = tokens
    return decoded, tiled


def live_pays(tokens: int, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `live_matmul` is not slower than torch even where no input is zero.

    `weight` [n_inputs, n_outputs]. Measured once for the shape and kept with the device's rates: the two round
    differently, and near a tie a process that measured anew could compute other bits than the one before. What cannot
    be computed does not pay, and nothing is measured while a graph is captured.
    """
    if weight.dtype not in DTYPES or weight.shape[1] * weight.element_size() % 16 or weight.data_ptr() % 16:
        return False
    precision = float32_precision("cuda") if weight.dtype is torch.float32 else ""
    kind = *weight.shape, 1 << (tokens - 1).bit_length(), bias is None, precision
    key = weight.device, weight.dtype, kind
    if key not in _pays:
        if torch.cuda.is_current_stream_capturing():
            return False
        try:
            _pays[key] = problem(nvrtc_part) is None and _kept_live_wins(kind, tokens, weight, bias)
        except torch.OutOfMemoryError:
            return False  # of what is measured with; there may be room at another time
        except KernelError:
            _pays[key] = False
    return _pays[key]


_pays: dict[Hashable, bool] = {}


def _kept_live_wins(kind: tuple[object, ...], tokens: int, weight: Tensor, bias: Tensor | None) -> bool:
    of = [*facts(weight.get_device()), nvrtc_part().detail, ROUNDS, MARGIN, *kind]
    wins = partial(_live_wins, tokens, weight, bias)
    return measured_once("gpu-live-rows", "gpu", weight.dtype, of, lambda found: isinstance(found, bool), wins)


@torch.inference_mode()
def _live_wins(tokens: int, weight: Tensor, bias: Tensor | None) -> bool:
    x = torch.ones(tokens, weight.shape[0], dtype=weight.dtype, device=weight.device)
    calls = [partial(linear, x, weight.t(), bias), partial(live_matmul, x, weight, bias)]
    dense, live = cold_seconds(calls, weight.device)
    return live <= MARGIN * dense


def cold_seconds(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """The median seconds of each call on the device, in turns, of which none finds its operands in the cache."""
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    seconds: list[list[float]] = [[] for _ in calls]
    # The events are those of the device's stream; an autocast would time torch in another dtype.
    with torch.cuda.device(device), torch.autocast("cuda", enabled=False):
        other = torch.empty(CACHES * cache_bytes, dtype=torch.uint8, device=device)
        for _ in range(1 + ROUNDS):
            for call, found in zip(calls, seconds, strict=True):
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                for _ in range(WRITES):
                    other.zero_()
                before.record()
                call()
                after.record()
                after.synchronize()
                found.append(before.elapsed_time(after) / 1e3)
    return [statistics.median(found[1:]) for found in seconds]  # the first one compiles
