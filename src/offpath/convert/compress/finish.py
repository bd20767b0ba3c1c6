"""The last step with an example: swap, compare, and swap back if anything is wrong."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from offpath.convert.compress.example import Example, largest_difference
from offpath.convert.compress.report import EndToEnd
from offpath.convert.compress.verify import Bound
from offpath.convert.swap import swap_modules

ROUNDS = 5


def swap_and_compare(
    example: Example,
    replacements: Mapping[nn.Module, nn.Module],
    bounds: Mapping[nn.Module, Bound],
    predicted_share_of_time: float,
) -> EndToEnd:
    """Swap for good, having timed the model with and without in turns.

    Raises `RuntimeError` for outputs that differ by more than the bounds of the layers explain; then, and whatever else
    is raised, the model has its dense layers.
    """
    outputs = example.outputs()
    bound = largest_difference(outputs, example.outputs_off_by_the_bound(bounds))
    back = {sparse: dense for dense, sparse in replacements.items()}
    before, after = [], []
    try:
        swap_modules(example.model, replacements)
        difference = largest_difference(outputs, example.outputs())
        if not difference <= bound:
            raise RuntimeError(
                f"the model's outputs on the example differ by {difference:.3g} of their norm, where the bounds of its "
                f"layers explain {bound:.3g}; nothing was changed. Compress fewer layers at a time, with filter_fn, to "
                "find which it is"
            )
        for _ in range(ROUNDS):
            swap_modules(example.model, back)
            before.append(example.seconds())
            swap_modules(example.model, replacements)
            after.append(example.seconds())
    except BaseException:
        swap_modules(example.model, back)
        raise
    return EndToEnd(min(before), min(before) * predicted_share_of_time, min(after), difference, bound)
