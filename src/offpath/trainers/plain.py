"""A state with tensors in it as plain JSON, and back."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TENSOR = "offpath tensor"


def to_plain(state: Any) -> Any:
    """`state` with its tensors (bool or uint8, of one dimension) as text: one bit for each boolean, compressed.

    >>> from_plain(to_plain({"step": 3, "unmoved": torch.tensor([True, False, True])}))
    {'step': 3, 'unmoved': tensor([ True, False,  True])}
    """
    if isinstance(state, Tensor):
        array = state.detach().cpu().numpy()
        data = np.packbits(array) if state.dtype == torch.bool else array.astype(np.uint8, casting="no")
        text = base64.b64encode(zlib.compress(data.tobytes())).decode()
        return {_TENSOR: text, "count": state.numel(), "bool": state.dtype == torch.bool}
    if isinstance(state, dict):
        return {key: to_plain(entry) for key, entry in state.items()}
    return state


def from_plain(plain: Any) -> Any:
    """What `to_plain` was given."""
    if not isinstance(plain, dict):
        return plain
    if _TENSOR not in plain:
        return {key: from_plain(entry) for key, entry in plain.items()}
    data = np.frombuffer(zlib.decompress(base64.b64decode(plain[_TENSOR])), np.uint8)
    if plain["bool"]:
        return torch.from_numpy(np.unpackbits(data, count=plain["count"]).astype(bool))
    return torch.from_numpy(data.copy())
