"""Whether a convolution goes over planes or over the weight written out: the faster one here, measured once."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from offpath import kernels
from offpath.kernels import Backend, KernelError
from offpath.kernels.convolution import Convolution
from offpath.kernels.measured import measured_once
from offpath.kernels.undisturbed import fastest
from offpath.ops.choice import Explanation, Option, forced_method, reason
from offpath.ops.dense_convolution import DenseConvolution
from offpath.pattern import random

PRODUCTS = ("forward", "dx", "dvalues")
# The measurement takes as many images as this work, or one; large layers take as long per image as a batch of them.
# With AMX, torch multiplies bfloat16 about ten times as fast: to write the weight out would count as much as an image.
MEASURED_MULTIPLY_ADDS, MEASURED_ON_TILES = 1e9, 8e9
ROUNDS = 3
# torch's time depends on what else its library keeps in the caches; planes win near-ties.
MARGIN = 1.1


def pays_densely(
    backend: Backend, product: str, convolution: Convolution, nnz: int, like: Tensor, channels_last: bool, prefer: str
) -> bool:
    """Whether `product` is faster over the weight written out, for images of the dtype and as many as in `like`.

    Always where the backend has no kernels of its own; raises `KernelError` where such ones are asked for.
    """
    forced = forced_method(product)
    if backend.convolutions is None:
        if forced not in (None, "dense") or (forced is None and prefer == "memory"):
            asked = f"{product}={forced!r}" if forced else "prefer='memory'"
            raise KernelError(
                f"backend {backend.name!r} has no kernels for sparse convolutions, and computes them with the weight "
                f"written out; got {asked}, which rules that out. Leave it out, or move the model with .cpu()"
            )
        return True
    if forced is not None:
        return forced == "dense"
    if prefer == "memory" or not backend.native or nnz == 0 or like.shape[0] == 0:
        return False
    seconds = _predicted(backend, convolution, nnz, like.shape[0], like.dtype, channels_last)
    return seconds[product]["dense"] * MARGIN < seconds[product]["planes"]


def explain_convolution(
    convolution: Convolution, values: Tensor, images: int, channels_last: bool, prefer: str
) -> Explanation:
    """How the products of a convolution with these `values` are computed for so many images, and what they cost."""
    backend = kernels.select(values.device.type, values.dtype)
    nnz, like = values.numel(), values.new_empty(images, device="meta")
    known = _predicted(backend, convolution, nnz, images, values.dtype, channels_last) if backend.native else None
    if backend.convolutions is None:
        methods: tuple[str, ...] = ("dense",)
    else:
        methods = ("planes", "dense") if backend.native and prefer == "speed" else ("planes",)
    options = tuple(Option(p, m, known[p][m] if known else None) for p in PRODUCTS for m in methods)
    chosen = {
        p: "dense" if pays_densely(backend, p, convolution, nnz, like, channels_last, prefer) else "planes"
        for p in PRODUCTS
    }
    return Explanation(backend.name, reason(known is not None, prefer), chosen, options)


def _predicted(
    backend: Backend, convolution: Convolution, nnz: int, images: int, dtype: torch.dtype, channels_last: bool
) -> dict[str, dict[str, float]]:
    """Seconds of each product by each method, from those of a similar layer that is measured once."""
    per_image = math.prod((*convolution.weight_shape, *convolution.outputs))
    on_tiles = dtype is torch.bfloat16 and "amx" in backend.name
    most = int((MEASURED_ON_TILES if on_tiles else MEASURED_MULTIPLY_ADDS) / per_image)
    measured, similar = min(images, max(1, most)), _rounded(convolution)
    seconds = _seconds(backend, similar, _rounded_nnz(convolution, nnz), measured, dtype, channels_last)
    more = images * math.prod(convolution.outputs) / (measured * math.prod(similar.outputs))
    return {product: {method: more * s for method, s in of.items()} for product, of in seconds.items()}


def _rounded(convolution: Convolution) -> Convolution:
    """Of images of similar size the middle one, so that images of many sizes are not measured one by one."""
    height, width = (
        n if n < 8 else max(d * (k - 1) + 1, 3 << (n.bit_length() - 2))
        for n, d, k in zip(convolution.size, convolution.dilation, convolution.kernel, strict=True)
    )
    return replace(convolution, size=(height, width))


def _rounded_nnz(convolution: Convolution, nnz: int) -> int:
    positions = math.prod(convolution.weight_shape)
    return max(1, round(round(50 * nnz / positions) / 50 * positions))


@cache
def _seconds(
    backend: Backend, convolution: Convolution, nnz: int, images: int, dtype: torch.dtype, channels_last: bool
) -> dict[str, dict[str, float]]:
    facts: list[object] = [repr(convolution), nnz, images, channels_last]
    return measured_once(
        "convolution",
        backend.name,
        dtype,
        facts,
        _is_complete,
        lambda: _measure(backend, convolution, nnz, images, dtype, channels_last),
    )


def _is_complete(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and set(found) == set(PRODUCTS)
        and all(set(of) == {"planes", "dense"} and min(of.values()) > 0 for of in found.values())
    )


@torch.inference_mode()
def _measure(
    backend: Backend, convolution: Convolution, nnz: int, images: int, dtype: torch.dtype, channels_last: bool
) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    pattern = random(convolution.weight_shape, nnz, generator)

    def drawn(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator).to(dtype)
        return made.contiguous(memory_format=torch.channels_last) if channels_last else made

    values = torch.randn(nnz, generator=generator).to(dtype)
    x = drawn(images, convolution.in_channels, *convolution.size)
    dy = drawn(images, convolution.out_channels, *convolution.outputs)
    products = backend.convolutions
    assert products is not None
    planes = products.prepare(pattern.crow_indices, pattern.col_indices, convolution, dtype)
    bitmap = backend.bitmap(pattern.crow_indices, pattern.col_indices, pattern.shape[1])
    dense = DenseConvolution(backend, bitmap, convolution)
    calls = {
        ("forward", "planes"): lambda: products.forward(planes, values, x, None, channels_last),
        ("forward", "dense"): lambda: dense.forward(values, x, None),
        ("dx", "planes"): lambda: products.dx(planes, values, dy, channels_last),
        ("dx", "dense"): lambda: dense.dx(values, dy, x.shape, channels_last),
        ("dvalues", "planes"): lambda: products.dvalues(planes, dy, x),
        ("dvalues", "dense"): lambda: dense.dvalues(dy, x),
    }
    best = fastest(calls, ROUNDS)
    return {product: {method: best[product, method] for method in ("planes", "dense")} for product in PRODUCTS}
