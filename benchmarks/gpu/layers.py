"""Times of layers as users call them: what the cost model chooses, beside its dense method and `nn.Linear`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from contenders import Contender, of_sparse_linear
from gpu.check import summed_in_float32, sums
from gpu.jobs import Job, Raced, Sides, Wanted, require
from gpu.timing import Call, Effort, copies_needed
from measure import check_forward, check_step, dtype_name, training_step
from offpath import SparseLinear
from offpath.nn import PackedSparseLinear
from offpath.ops import forced_methods
from verdicts import Figure

LINEAR, DENSE_METHOD, OURS = "nn.Linear", "its dense method", "offpath"
CHOICE_BAR = 0.97  # of issue 7: never more than 3 % slower than the dense path
WIDTH, QUICK_WIDTH = 4096, 512
SPARSITIES, PACKED_SPARSITIES = (0.5, 0.9, 0.98), (0.3, 0.5, 0.7, 0.9)
TOKENS, PACKED_TOKENS = (4096, 512, 64, 1), (1, 4, 8, 64)
TILED_TOKENS = (8, 16, 64)
DTYPES = (torch.float32, torch.bfloat16)
MOST_COPIES = 64
Make = Callable[[nn.Module], Call]


def jobs(quick: bool, effort: Effort, device: torch.device) -> Iterator[Job]:
    width, sparsities, tokens = (QUICK_WIDTH, (0.9,), (64,)) if quick else (WIDTH, SPARSITIES, TOKENS)
    packed = [
        (tiles, sparsity, count)
        for tiles, counts in ((False, PACKED_TOKENS), (True, TILED_TOKENS))
        for sparsity in (sparsities[:1] if quick else PACKED_SPARSITIES)
        for count in (tokens[:1] if quick else counts)
    ]
    for tiles, sparsity, count in packed:
        if not tiles:
            yield _packed_job(width, sparsity, tiles, count, effort, device)
    for dtype in DTYPES:
        for sparsity in sparsities:
            for count in tokens:
                for what, measure in (("forward", _forward), ("training", _step)):
                    row = f"{dtype_name(dtype)} {width} -> {width}, {count} token{'s' if count > 1 else ''}, {what}"
                    wanted = tuple(
                        Wanted(Figure(f"SparseLinear over {over}", row, f"{sparsity:.0%}", bar), OURS, (over,))
                        for over, bar in ((DENSE_METHOD, CHOICE_BAR), (LINEAR, None))
                    )
                    kernels = "spmm", "sddmm", "expand", "compress"
                    yield Job(wanted, kernels, partial(measure, width, sparsity, count, dtype, effort, device))
    for tiles, sparsity, count in packed:
        if tiles:  # last: what goes wrong in a kernel that no GPU has run yet ends nothing else
            yield _packed_job(width, sparsity, tiles, count, effort, device)


def _packed_job(width: int, sparsity: float, tiles: bool, tokens: int, effort: Effort, device: torch.device) -> Job:
    row = f"bf16 {width} -> {width}, {tokens} token{'s' if tokens > 1 else ''}, forward"
    section = f"PackedSparseLinear{', with tiles' if tiles else ''} over {LINEAR}"
    figure = Figure(section, row, f"{sparsity:.0%}", CHOICE_BAR)
    kernels = "decode_n4", "decode_c16", *(("multiply_tiles",) if tiles else ())
    measure = partial(_packed, width, sparsity, tiles, tokens, effort, device)
    return Job((Wanted(figure, OURS, (LINEAR,)),), kernels, measure)


@lru_cache(maxsize=1)
def _contender(width: int, sparsity: float, dtype: torch.dtype, device: torch.device) -> Contender:
    return of_sparse_linear(SparseLinear(width, width, sparsity=sparsity, dtype=dtype).to(device))


def _forward(
    width: int, sparsity: float, tokens: int, dtype: torch.dtype, effort: Effort, device: torch.device
) -> Raced:
    sparse = _contender(width, sparsity, dtype, device)
    x = torch.randn(tokens, width, dtype=dtype, device=device)
    with summed_in_float32():
        check_forward(sparse, x)
    with torch.no_grad():
        return _sides(sparse.layer, tokens, lambda one: partial(one, x)).race(effort)


def _step(width: int, sparsity: float, tokens: int, dtype: torch.dtype, effort: Effort, device: torch.device) -> Raced:
    sparse = _contender(width, sparsity, dtype, device)
    x, dy = (torch.randn(tokens, width, dtype=dtype, device=device) for _ in range(2))
    with summed_in_float32():
        check_step(sparse, x, dy)
    x.requires_grad_()
    return _sides(sparse.layer, tokens, lambda one: partial(training_step, one, x, dy)).race(effort, graphs=False)


def _packed(width: int, sparsity: float, tiles: bool, tokens: int, effort: Effort, device: torch.device) -> Raced:
    """The layer has measured by itself up to how many tokens it reads the packed weight."""
    layer, weight = _packed_layer(width, sparsity, tiles, device)
    x = torch.randn(tokens, width, dtype=torch.bfloat16, device=device)
    with torch.inference_mode():
        exact, size = (by(x.double()) @ by(weight.double()).t() for by in (torch.clone, torch.abs))
        terms = (weight != 0).sum(1)
        with summed_in_float32():
            require("the output", layer(x), sums(exact, size, terms, torch.bfloat16))
        linear = nn.Linear(width, width, bias=False, dtype=torch.bfloat16, device=device)
        sides = {LINEAR: linear, OURS: layer}
        calls = {name: [partial(one, x) for one in cold(side, tokens)] for name, side in sides.items()}
        return Sides(calls).race(effort)


@lru_cache(maxsize=1)
def _packed_layer(width: int, sparsity: float, tiles: bool, device: torch.device) -> tuple[PackedSparseLinear, Tensor]:
    layer = SparseLinear(width, width, bias=False, sparsity=sparsity, dtype=torch.bfloat16).to(device)
    return PackedSparseLinear.from_sparse(layer, tiles=tiles), layer.to_dense().weight.detach()


def cold(layer: nn.Module, tokens: int) -> list[nn.Module]:
    """The layer and as many copies as no cache holds together, for calls of so many tokens; at most 64 of them."""
    count = min(copies_needed(read_bytes(layer, tokens)), MOST_COPIES)
    return [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]


def read_bytes(layer: nn.Module, tokens: int) -> int:
    """What one call of so many tokens reads of the layer: a packed one holds its weight in up to three forms."""
    if not isinstance(layer, PackedSparseLinear):
        return sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers()))
    if tokens <= layer.tokens:
        return layer.packed.n_bytes
    if layer.tiles is not None and tokens <= layer.tiled_tokens:
        return layer.tiles.n_bytes
    return layer.packed.n_bytes if layer.weight is None else layer.weight.nbytes


def _sides(layer: SparseLinear, tokens: int, call: Make) -> Sides:
    linear = nn.Linear(layer.in_features, layer.out_features, dtype=layer.values.dtype, device=layer.values.device)
    dense, sparse = ([call(one) for one in cold(side, tokens)] for side in (linear, layer))
    return Sides({LINEAR: dense, DENSE_METHOD: list(map(_densely, sparse)), OURS: sparse})


def _densely(call: Call) -> Call:
    def run() -> object:
        with forced_methods(forward="dense", dx="dense", dvalues="dense"):
            return call()

    return run
