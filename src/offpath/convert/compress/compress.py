"""The way in: find, build, check, measure, decide; and only then touch the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from offpath.convert.compress.candidates import Candidate, FilterFn, find
from offpath.convert.compress.decide import GOALS, decide
from offpath.convert.compress.example import Example, evaluating, largest_difference
from offpath.convert.compress.measure import Trial, in_rotation, random_input
from offpath.convert.compress.report import CompressedLayer, CompressReport, EndToEnd, Measured
from offpath.convert.compress.verify import check_layer
from offpath.convert.compress.weights import kind_of, stand_in
from offpath.convert.swap import swap_modules
from offpath.cost import memory_bytes
from offpath.nn import SparseLinear

LATENCY_TOKENS, THROUGHPUT_TOKENS = 1, 256
BUDGET_SECONDS = 2.0
END_TO_END_ROUNDS = 5
Progress = Callable[[int, int], object]
Input = tuple[tuple[int, ...], torch.dtype]


def compress(
    model: nn.Module,
    batch: int | None = None,
    *,
    example: object = None,
    filter_fn: FilterFn | None = None,
    min_sparsity: float = 0.5,
    goal: str = "speed",
    progress: Progress = lambda done, total: None,
) -> CompressReport:
    """Swap the layers of `model` that are mostly zero for sparse ones, in place, where that is faster on this machine.

    Looks at `nn.Linear` and at the Conv1D of Hugging Face transformers of which at least `min_sparsity` is zero: plain
    zeros, masks of `torch.nn.utils.prune` and parametrizations, which a swap makes permanent. Each is timed, dense
    beside sparse, and swapped if it is slower with none of the inputs asked for: `batch` tokens a call; the shapes that
    each layer sees while the model runs on `example` (a tensor, a tuple of positional or a mapping of keyword
    arguments); or, with neither, both 1 token and 256. `goal="size"` swaps what gets smaller, whatever its speed.
    `filter_fn(module, fqn)` chooses the layers to look at. `progress(done, total)` is called along the way. Training
    and evaluation mode, dtype and `requires_grad` stay; build an optimizer afterwards.

    Each sparse layer's output is first compared with float64, within the bound of `offpath.cost.bounds`. With an
    example, the whole model is run as well: the report predicts its time and holds what it then is, and outputs that
    differ by more than rounding explains undo the swap. Takes seconds, and the first time on a machine some more, to
    measure the kernels. Peak memory: the dense model, the sparse layers beside it, and one layer in float64.

    Layers that cannot be swapped are in the report with the reason. Raises `ValueError` for a bad argument, a model
    that is itself such a layer or not on the CPU, a mask of the wrong shape and a mostly zero weight with NaN or
    infinity; `TypeError` for an example of the wrong kind; `RuntimeError` for results that are not right. Whatever is
    raised, the model is as it was before.

    >>> from offpath.convert import sparsify
    >>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    >>> _ = torch.nn.utils.prune.l1_unstructured(model[0], "weight", 0.95)
    >>> report = compress(model, batch=64)
    >>> model[0]
    SparseLinear(in_features=512, out_features=512, bias=True, nnz=13107, sparsity=0.95)
    >>> report.skipped
    (('2', 'less than 50% of its weights are zero'),)
    """
    _check_arguments(model, batch, example, min_sparsity, goal)
    candidates, skipped = find(model, filter_fn, min_sparsity)
    whole = None if example is None else Example(model, example)
    inputs = _inputs(candidates, batch, whole)
    for candidate in candidates:
        if candidate.module not in inputs:
            skipped.append((candidate.name, "the example does not reach it, so that nothing tells what it is used for"))
    candidates = [candidate for candidate in candidates if candidate.module in inputs]

    stages = 1 + max((len(calls) for calls in inputs.values()), default=0)
    total = len(candidates) * stages
    sparse = {}
    for done, candidate in enumerate(candidates):
        sparse[candidate.module] = _build(candidate, inputs[candidate.module])
        progress(done + 1, total)
    measured, whole_seconds = _measure(
        model, whole, candidates, sparse, inputs, lambda stage: progress(round(len(candidates) * stage), total)
    )
    layers = [
        _layer(candidate, sparse[candidate.module], measured[candidate.module], goal, whole is not None)
        for candidate in candidates
    ]
    names = {c.module: c.name for c, layer in zip(candidates, layers, strict=True) if layer.swapped}
    replacements = {module: sparse[module] for module in names}
    before = memory_bytes(model)
    end_to_end = None
    if whole is None:
        swap_modules(model, replacements)
    else:
        saved = sum(layer.dense_seconds - layer.sparse_seconds for layer in layers if layer.swapped)
        end_to_end = _swap_and_compare(model, whole, replacements, names, 1 - saved / whole_seconds)
    return CompressReport(min_sparsity, tuple(layers), tuple(skipped), before, memory_bytes(model), end_to_end)


def _check_arguments(model: nn.Module, batch: int | None, example: object, min_sparsity: float, goal: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if kind_of(model) is not None:
        raise ValueError(
            f"expected a model that contains layers, got a {type(model).__name__} itself; use SparseLinear.from_dense"
        )
    if batch is not None and example is not None:
        raise ValueError("expected batch= or example=, got both: an example says how many tokens each layer sees")
    if batch is not None and not (isinstance(batch, int) and batch > 0):
        raise ValueError(f"expected batch to be a number of tokens, at least 1, got {batch!r}")
    if not 0 < min_sparsity < 1:
        raise ValueError(f"expected min_sparsity in (0, 1), got {min_sparsity}")
    if goal not in GOALS:
        raise ValueError(f"expected goal to be 'speed' or 'size', got {goal!r}")


def _inputs(
    candidates: Sequence[Candidate], batch: int | None, example: Example | None
) -> dict[nn.Module, Counter[Input]]:
    """For each layer, the inputs that count, and how often a pass brings each."""
    if example is not None:
        return {m: Counter(calls) for m, calls in example.inputs([c.module for c in candidates]).items()}
    tokens = (LATENCY_TOKENS, THROUGHPUT_TOKENS) if batch is None else (batch,)
    inputs: dict[nn.Module, Counter[Input]] = {}
    for candidate in candidates:
        like = stand_in(candidate.module, candidate.name)
        inputs[candidate.module] = Counter(((t, like.in_features), like.weight.dtype) for t in tokens)
    return inputs


def _build(candidate: Candidate, inputs: Counter[Input]) -> SparseLinear:
    dense = stand_in(candidate.module, candidate.name)
    layer = SparseLinear.from_dense(dense)
    for shape, dtype in inputs:
        check_layer(candidate.name, dense, layer, random_input(shape, dtype))
    return layer


def _measure(
    model: nn.Module,
    whole: Example | None,
    candidates: Sequence[Candidate],
    sparse: dict[nn.Module, SparseLinear],
    inputs: dict[nn.Module, Counter[Input]],
    tick: Callable[[float], object],
) -> tuple[dict[nn.Module, tuple[Measured, ...]], float]:
    """Each layer with each of its inputs, and the seconds of a pass of the example in turns with them.

    Layers that have an n-th input are timed together, in the model's order.
    """
    measured: dict[nn.Module, list[Measured]] = {candidate.module: [] for candidate in candidates}
    made: dict[Input, torch.Tensor] = {}
    whole_seconds = 0.0
    for place in range(max((len(calls) for calls in inputs.values()), default=0)):
        modules = [c.module for c in candidates if len(inputs[c.module]) > place]
        chosen = [list(inputs[module].items())[place] for module in modules]
        trials = []
        for module, (seen, _) in zip(modules, chosen, strict=True):
            if seen not in made:
                made[seen] = random_input(*seen)
            trials.append(Trial(_key(sparse[module], seen), module, sparse[module], made[seen]))
        also = _nothing if whole is None or place else whole.run
        with evaluating(model):
            rotation = in_rotation(trials, BUDGET_SECONDS, also, partial(_tick_from, tick, 1 + place))
        for module, ((shape, _), calls), seconds in zip(modules, chosen, rotation.trials, strict=True):
            measured[module].append(Measured(math.prod(shape[:-1]), calls, *seconds))
        whole_seconds = whole_seconds or rotation.also_seconds
    return {module: tuple(results) for module, results in measured.items()}, whole_seconds


def _nothing() -> None:
    pass


def _tick_from(tick: Callable[[float], object], stage: int, share: float) -> None:
    tick(stage + share)


def _key(layer: SparseLinear, seen: Input) -> tuple:
    """Layers of one key are timed as one: of the same sizes, and of densities that differ by less than a tenth."""
    density = round(10 * math.log(layer.density)) if layer.nnz else None
    return layer.out_features, layer.in_features, layer.values.dtype, layer.bias is None, seen, density


def _layer(
    candidate: Candidate, sparse: SparseLinear, measured: tuple[Measured, ...], goal: str, whole_pass: bool
) -> CompressedLayer:
    before, after = memory_bytes(candidate.module), memory_bytes(sparse)
    swap, reason = decide(goal, measured, whole_pass, before, after)
    shape = (sparse.out_features, sparse.in_features)
    return CompressedLayer(candidate.name, candidate.kind, shape, candidate.nnz, before, after, measured, swap, reason)


def _swap_and_compare(
    model: nn.Module,
    example: Example,
    replacements: dict[nn.Module, SparseLinear],
    names: dict[nn.Module, str],
    share_of_time: float,
) -> EndToEnd:
    """Swap, and swap back if the outputs disagree or anything is raised."""
    outputs = example.outputs()
    bound = largest_difference(outputs, example.outputs_off_by_the_bound(names))
    back: dict[nn.Module, nn.Module] = {layer: module for module, layer in replacements.items()}
    dense_seconds, sparse_seconds = [], []
    try:
        swap_modules(model, replacements)
        difference = largest_difference(outputs, example.outputs())
        if not difference <= bound:
            raise RuntimeError(
                f"the model's outputs on the example differ by {difference:.3g} of their norm, where rounding explains "
                f"{bound:.3g}; nothing was changed. Compress fewer layers at a time with filter_fn to find which"
            )
        for _ in range(END_TO_END_ROUNDS):
            swap_modules(model, back)
            dense_seconds.append(example.seconds())
            swap_modules(model, replacements)
            sparse_seconds.append(example.seconds())
    except BaseException:
        swap_modules(model, back)
        raise
    before = min(dense_seconds)
    return EndToEnd(before, before * share_of_time, min(sparse_seconds), difference, bound)
