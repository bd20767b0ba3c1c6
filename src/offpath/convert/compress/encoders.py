"""Whether sparse layers are worth the fused path that torch's encoders lose by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from offpath.convert.compress.example import Example, Input
from offpath.convert.compress.report import tokens_in_words
from offpath.convert.fused_encoders import fused_layers
from offpath.convert.swap import swapped

ROUNDS = 5


def faster_fused(
    model: nn.Module, example: Example | None, replacements: Mapping[nn.Module, nn.Module], tokens: Sequence[int]
) -> dict[nn.Module, str]:
    """The dense layers among `replacements` that stay, because the encoders around them are faster fused; and why.

    With an example, the model is timed on it with and without the sparse layers that are in encoders; without one, its
    encoder layers, one after the other, with a sequence of each of these numbers of `tokens`. Either all stay or none
    does. The model is as it was afterwards.
    """
    owners = fused_layers(model, replacements)
    inside = {m: replacements[m] for owner in owners for m in owner.modules() if m in replacements}
    if not inside:
        return {}
    if example is not None:
        with swapped(model, {dense: sparse for dense, sparse in replacements.items() if dense not in inside}):
            return _slower(model, [example], inside, "the whole model")
    for count in tokens:
        examples = [Example(owner, _sequence(owner, count)) for owner in owners]
        if slower := _slower(model, examples, inside, f"all of them with {tokens_in_words(count)}"):
            return slower
    return {}


def _sequence(layer: nn.TransformerEncoderLayer, tokens: int) -> Tensor:
    return Input((1, tokens, layer.self_attn.embed_dim), layer.norm1.weight.dtype).random()


def _slower(
    model: nn.Module, examples: Sequence[Example], replacements: Mapping[nn.Module, nn.Module], what: str
) -> dict[nn.Module, str]:
    """Why each of `replacements` stays; empty if `model` is faster with them."""
    fused, sparse = [], []
    for _ in range(ROUNDS):
        fused.append(sum(example.seconds() for example in examples))
        with swapped(model, replacements):
            sparse.append(sum(example.seconds() for example in examples))
    dense_seconds, sparse_seconds = min(fused), min(sparse)
    if sparse_seconds <= dense_seconds:
        return {}
    reason = (
        f"torch computes dense encoder layers in one fused call each, which is faster here: {dense_seconds * 1e3:.3g} "
        f"ms against {sparse_seconds * 1e3:.3g} for {what}"
    )
    return dict.fromkeys(replacements, reason)
