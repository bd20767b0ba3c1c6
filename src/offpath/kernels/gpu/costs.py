"""Seconds that the methods take on a device: by a model of what each reads, writes and multiplies, at measured rates.

The grid that tells of the CPU's methods would miss what a GPU has: thousands of tokens at once. Its products are simple
enough to be calculated from nine rates, which `rates.py` measures once on each kind of device.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from offpath.kernels.gpu.few_tokens import FEW_TOKENS
from offpath.kernels.gpu.rates import Rates, rates_here

# No GPU has run these yet: they are checked on the CPU, and computed with where they are forced.
UNKNOWN = ("bucketed", "tiled")
# Kernels of a call beside the one that multiplies: activations to their features and back.
TURNS = 2
# One of Triton's, and one of torch's at half its price: such a one also puts values into the transposed order.
DENSE_LAUNCHES, TRANSPOSED_LAUNCHES = 1.5, 0.5
# What a counting sort of the entries moves for each of them, in about so many kernels.
SORT_BYTES, SORT_KERNELS = 48, 8
WRITE_OUT_KERNELS = 4


class DeviceCosts:
    """The costs of the current device."""

    def layer(
        self, product: str, method: str, rows: int, columns: int, nnz: int, batch: int, dtype: torch.dtype
    ) -> float:
        """Seconds of one product of a layer; see `Costs`. Methods over plans are never the cheapest: see `UNKNOWN`."""
        if method in UNKNOWN:
            return math.inf
        return layer_seconds(rates_here(dtype), product, method, rows, columns, nnz, batch)

    def rows(
        self, product: str, nnz: int, rows: int, columns: int, width: int, dtype: torch.dtype
    ) -> tuple[float, float]:
        """Seconds of one product of sparse rows, as they are and written out; see `Costs`."""
        return row_seconds(rates_here(dtype), product, nnz, rows, columns, width)


@cache
def layer_seconds(rates: Rates, product: str, method: str, rows: int, columns: int, nnz: int, batch: int) -> float:
    """Seconds of one product of a weight [rows, columns] with `nnz` connections and `batch` tokens.

    The device's, or the host's where launching takes longer: both work at the same time.
    """
    few = method == "row-wise" and batch < FEW_TOKENS
    launches = DENSE_LAUNCHES if method == "dense" else 1 if few else 1 + TURNS
    if method == "row-wise" and product == "dx":
        launches += TRANSPOSED_LAUNCHES
    device = _device_seconds(rates, product, method, rows, columns, nnz, batch)
    return max(device, launches * rates.launch_seconds)


def _device_seconds(rates: Rates, product: str, method: str, rows: int, columns: int, nnz: int, batch: int) -> float:
    if method == "dense":
        written = rates.call_seconds + rows * columns / rates.expanded_positions + _moving(rates, nnz)
        return dense_seconds(rates, rows, columns, batch) + written
    values = rates.call_seconds + _moving(rates, 3 * nnz) if product == "dx" else 0.0  # in the transposed order
    if batch < FEW_TOKENS:
        connections = nnz * (1 + (batch - 1) * rates.few_share)
        rate = rates.few_dots if product == "dvalues" else rates.few_connections
        return rates.call_seconds + values + connections / rate
    turned = TURNS * rates.call_seconds + _moving(rates, 2 * batch * (rows + columns))
    if product == "dvalues":
        return rates.call_seconds + nnz * batch / rates.dotted_elements + turned
    return rates.call_seconds + values + nnz * batch / rates.gathered_elements + turned


@cache
def row_seconds(rates: Rates, product: str, nnz: int, rows: int, columns: int, width: int) -> tuple[float, float]:
    """Seconds of one product of sparse rows with a matrix [columns, width]: as they are, and with their zeros."""
    written = WRITE_OUT_KERNELS * rates.call_seconds + _moving(rates, 2 * rows * columns + 3 * nnz)
    dense = dense_seconds(rates, columns, width, rows) + written
    rate = rates.dotted_elements if product == "dots" else rates.gathered_elements
    gathered = nnz * width / rate
    if product == "weight_gradient":
        gathered += SORT_KERNELS * rates.call_seconds + nnz * SORT_BYTES / rates.moved_bytes
        gathered += _moving(rates, columns * width)
    elif columns * width * rates.element_bytes > rates.cache_bytes:
        gathered = max(gathered, _moving(rates, nnz * width))
    return rates.call_seconds + gathered, dense


def dense_seconds(rates: Rates, rows: int, columns: int, batch: int) -> float:
    """Seconds of torch's product of a dense weight with so many tokens, at the best rate that it ever reaches."""
    moved = _moving(rates, rows * columns + batch * (rows + columns))
    return rates.call_seconds + max(2 * rows * columns * batch / rates.dense_flops, moved)


def _moving(rates: Rates, elements: int) -> float:
    return elements * rates.element_bytes / rates.moved_bytes
