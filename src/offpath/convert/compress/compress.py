"""The way in: find, build, check, measure, decide; and only then touch the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real

import torch
from torch import nn

from offpath.convert.buffers import buffers_restored
from offpath.convert.compress.candidates import find
from offpath.convert.compress.contest import Contest, Rest, contests, measure
from offpath.convert.compress.decide import GOALS, decide
from offpath.convert.compress.embeddings import int8_embeddings
from offpath.convert.compress.encoders import faster_fused
from offpath.convert.compress.example import Example
from offpath.convert.compress.finish import swap_and_compare
from offpath.convert.compress.report import CompressedEmbedding, CompressedLayer, CompressReport
from offpath.convert.compress.verify import Bound, embedding_bound, swap_bound
from offpath.convert.compress.weights import kind_of
from offpath.convert.swap import swap_modules
from offpath.cost import memory_bytes
from offpath.nn.compiled import inside_compiled
from offpath.nn.filters import FilterFn

PRECISIONS = (None, "int8")
Progress = Callable[[int, int], object]


@torch.inference_mode(False)  # parameters that are made in inference mode could not be trained
def compress(
    model: nn.Module,
    batch: int | None = None,
    *,
    example: object = None,
    filter_fn: FilterFn | None = None,
    min_sparsity: float = 0.5,
    goal: str = "speed",
    precision: str | None = None,
    embeddings: str | None = None,
    progress: Progress = lambda done, total: None,
) -> CompressReport:
    """Swap the layers of `model` that are mostly zero for sparse ones, in place, where that is faster on this machine.

    Looks at `nn.Linear`, at the Conv1D of Hugging Face transformers and, with an example, at `nn.Conv1d` and
    `nn.Conv2d` of which at least `min_sparsity` is zero: plain zeros, masks of `torch.nn.utils.prune` and
    parametrizations, which a swap makes permanent. Each is timed, dense beside sparse, and swapped if it is slower with
    none of the inputs asked for: `batch` tokens a call; what each layer sees while the model runs on `example` (a
    tensor, a tuple of positional or a mapping of keyword arguments); or, with neither, both 1 token and 256.
    `goal="size"` swaps what gets smaller for any number of tokens, for layers of `prefer="memory"`, whatever its speed.
    `precision="int8"` makes `nn.Int8SparseLinear` of linear layers, `embeddings="int8"` turns embeddings into
    `nn.Int8Embedding`: both are for inference, and off by up to half a step of 1/127 of the largest weight of a row.
    `filter_fn(module, fqn)` chooses the layers to look at. `progress(done, total)` is called along the way. Training
    and evaluation mode, dtype and `requires_grad` stay; build an optimizer afterwards.

    Each sparse layer's output is first compared with float64, within the bound of `offpath.cost.bounds`. With an
    example, the whole model is run as well: the report predicts its time and holds what it then is, and outputs that
    differ by more than the layers' bounds explain undo the swap. Layers in torch's encoders, which compute dense ones
    fused, are swapped for speed only where the encoders are faster. Takes seconds, and the first time on a machine some
    more, to measure the kernels. Peak memory: the dense model, the sparse layers beside it, one layer in float64.

    Layers that cannot be swapped are in the report with the reason. Raises `ValueError` for a bad argument, a model
    that is itself such a layer or not on the CPU, a mask of the wrong shape, a mostly zero layer with NaN or infinity,
    a model that does not do the same whenever it is called with the example, and under `torch.autocast`; `TypeError`
    for an example of the wrong kind; `RuntimeError` for results that are not right. Whatever is raised, the model is as
    it was before.

    >>> from torch.nn.utils import prune
    >>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    >>> _ = prune.l1_unstructured(model[0], "weight", 0.95)
    >>> report = compress(model, batch=64, goal="size")
    >>> model[0]
    SparseLinear(in_features=512, out_features=512, bias=True, nnz=13107, sparsity=0.95)
    >>> report.skipped
    (('2', 'less than 50% of its weights are zero'),)
    """
    model = inside_compiled(model)
    _check_arguments(model, batch, example, min_sparsity)
    for name, value, choices in (
        ("goal", goal, GOALS),
        ("precision", precision, PRECISIONS),
        ("embeddings", embeddings, PRECISIONS),
    ):
        if value not in choices:
            raise ValueError(f"expected {name} to be {' or '.join(map(repr, choices))}, got {value!r}")
    candidates, skipped, left_out = find(model, filter_fn, min_sparsity)
    # The example runs the model many times, which may remember what it saw.
    with buffers_restored(model):
        whole = None if example is None else Example(model, example)
        entered, unreached = contests(candidates, batch, whole, precision, goal, progress)
        rest = measure(model, whole, entered, progress)
        layers = [_layer(contest, goal, whole is not None) for contest in entered]
        if goal == "speed":
            layers = _unless_fused(model, whole, entered, layers)
        replacements: dict[nn.Module, nn.Module] = {}
        bounds: dict[nn.Module, Bound] = {}
        for contest, layer in zip(entered, layers, strict=True):
            if layer.swapped:
                replacements[contest.dense] = contest.sparse
                bounds[contest.dense] = swap_bound(contest.stand_in, contest.sparse)
        tables = []
        if embeddings is not None:
            found, left = int8_embeddings(model, filter_fn)
            skipped += left
            for name, (table, small) in found.items():
                replacements[table], bounds[table] = small, embedding_bound(small)
                tables.append(
                    CompressedEmbedding(
                        name, (table.num_embeddings, table.embedding_dim), memory_bytes(table), memory_bytes(small)
                    )
                )

        before, end_to_end = memory_bytes(model), None
        if whole is None:
            swap_modules(model, replacements)
        else:
            end_to_end = swap_and_compare(whole, replacements, bounds, _predicted_share(layers, rest))
        after = memory_bytes(model)
        left_alone = (*skipped, *unreached)
        return CompressReport(
            min_sparsity, tuple(layers), left_alone, before, after, end_to_end, tuple(tables), left_out
        )


def _unless_fused(
    model: nn.Module, whole: Example | None, entered: Sequence[Contest], layers: Sequence[CompressedLayer]
) -> list[CompressedLayer]:
    """Layers whose gain is less than what the encoder around them loses stay dense, with the reason."""
    won = {c.dense: c.sparse for c, layer in zip(entered, layers, strict=True) if layer.swapped}
    tokens = dict.fromkeys(m.tokens for layer in layers for m in layer.measured)
    stay = faster_fused(model, whole, won, tuple(tokens))
    return [
        replace(layer, swapped=False, reason=stay[contest.dense]) if contest.dense in stay else layer
        for contest, layer in zip(entered, layers, strict=True)
    ]


def _predicted_share(layers: Sequence[CompressedLayer], rest: Rest | None) -> float:
    """What part of its time the model is expected to take afterwards."""
    dense = sum(layer.dense_seconds for layer in layers)
    if rest is None or not dense:
        return 1.0
    swapped = sum(layer.dense_seconds for layer in layers if layer.swapped) / dense
    after = sum(layer.sparse_seconds if layer.swapped else layer.dense_seconds for layer in layers)
    return (rest.beside(swapped) + after) / (rest.beside(0) + dense)


def _check_arguments(model: nn.Module, batch: int | None, example: object, min_sparsity: float) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if kind_of(model) is not None:
        raise ValueError(
            f"expected a model that contains layers, got a {type(model).__name__} itself; use SparseLinear.from_dense"
        )
    if batch is not None and example is not None:
        raise ValueError("expected batch= or example=, got both: an example says how many tokens each layer sees")
    if batch is not None and (isinstance(batch, bool) or not (isinstance(batch, int) and batch > 0)):
        raise ValueError(f"expected batch to be a number of tokens, at least 1, got {batch!r}")
    if not (isinstance(min_sparsity, Real) and 0 < min_sparsity < 1):
        raise ValueError(f"expected min_sparsity in (0, 1), got {min_sparsity!r}")
    if torch.is_autocast_enabled("cpu"):
        raise ValueError(
            "expected compress outside of torch.autocast, in which layers do not compute in the dtype of their "
            "weights; leave its block, and cast the model with .bfloat16() if that is what it is to compute in"
        )


def _layer(contest: Contest, goal: str, whole_pass: bool) -> CompressedLayer:
    before, after, at_most = memory_bytes(contest.dense), memory_bytes(contest.sparse), contest.bytes_at_most()
    swap, reason = decide(goal, contest.measured, whole_pass, before, at_most)
    return CompressedLayer(
        contest.candidate.name,
        contest.candidate.kind,
        type(contest.sparse).__name__,
        (contest.sparse.out_features, contest.sparse.in_features),
        contest.candidate.nnz,
        before,
        after,
        at_most,
        tuple(contest.measured),
        swap,
        reason,
    )
