"""The last step with an example: swap, compare, and swap back if anything is wrong."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from offpath.convert.compress.example import Example, differences
from offpath.convert.compress.report import EndToEnd
from offpath.convert.compress.verify import Bound
from offpath.convert.fused_encoders import called_by_encoders, fused_layers
from offpath.convert.swap import swap_modules

ROUNDS = 5


def swap_and_compare(
    example: Example,
    replacements: Mapping[nn.Module, nn.Module],
    bounds: Mapping[nn.Module, Bound],
    predicted_share_of_time: float,
) -> EndToEnd:
    """Swap for good, having timed the model with and without in turns.

    Raises `RuntimeError` for outputs that differ by more than the bounds of the layers explain, and `ValueError` for
    outputs that cannot be compared; then, and whatever else is raised, the model has its dense layers.
    """
    if not replacements:
        seconds = min(example.seconds() for _ in range(ROUNDS))
        return EndToEnd(seconds, seconds, seconds, 0.0, 0.0)
    outputs = example.outputs(called=replacements)
    if not any(bool(torch.isfinite(output).any()) for output in outputs):
        raise ValueError(
            "expected finite numbers among what the model returns for the example, in tensors, mappings, sequences or "
            "dataclasses, to compare before and after; got none. Check the example, or give batch= instead"
        )
    # The layers behind round what reaches them: less than one rounding of what the model returns tells nothing.
    explained = max(differences(outputs, example.outputs_off_by_the_bound(bounds)))
    allowed = [max(explained, torch.finfo(output.dtype).eps) for output in outputs]
    back = {sparse: dense for dense, sparse in replacements.items()}
    before, called, after = [], [], []
    ends_fused = bool(fused_layers(example.model, replacements))
    try:
        swap_modules(example.model, replacements)
        found = differences(outputs, example.outputs())
        difference, bound = max(zip(found, allowed, strict=True), key=lambda pair: pair[0] / pair[1])
        if not difference <= bound:
            swap_modules(example.model, back)
            drift = max(differences(outputs, example.outputs(called=replacements)))
            if drift:
                raise ValueError(
                    "expected a model that returns the same whenever it is called with the example, but its dense "
                    f"layers alone gave outputs that differ by {drift:.3g} of their norm: it changes the example in "
                    "place, or keeps a state such as a cache. Nothing was changed; leave that out, or give batch= "
                    "instead"
                )
            raise RuntimeError(
                f"the model's outputs on the example differ by {difference:.3g} of their norm, where the bounds of its "
                f"layers explain {bound:.3g}; nothing was changed. Compress fewer layers at a time, with filter_fn, to "
                "find which it is"
            )
        for _ in range(ROUNDS):
            swap_modules(example.model, back)
            before.append(example.seconds())
            if ends_fused:  # the prediction is about layers that are called
                with called_by_encoders(example.model, replacements):
                    called.append(example.seconds())
            swap_modules(example.model, replacements)
            after.append(example.seconds())
    except BaseException:
        swap_modules(example.model, back)
        raise
    return EndToEnd(min(before), min(called or before) * predicted_share_of_time, min(after), difference, bound)
