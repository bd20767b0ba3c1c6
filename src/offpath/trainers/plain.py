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
    """`state` with its tensors as text: one bit for each boolean, compressed. Tuples come back as lists.

    >>> from_plain(to_plain({"step": 3, "unmoved": torch.tensor([True, False, True]), "passes": [torch.ones(1, 2)]}))
    {'step': 3, 'unmoved': tensor([ True, False,  True]), 'passes': [tensor([[1., 1.]])]}
    """
    if isinstance(state, Tensor):
        flat = state.detach().cpu().contiguous().view(-1)
        data = np.packbits(flat.numpy()) if state.dtype == torch.bool else flat.view(torch.uint8).numpy()
        text = base64.b64encode(zlib.compress(data.tobytes())).decode()
        kind = {"dtype": str(state.dtype).removeprefix("torch."), "shape": list(state.shape)}
        return {_TENSOR: text, "count": state.numel(), "bool": state.dtype == torch.bool, **kind}
    if isinstance(state, dict):
        return {key: to_plain(entry) for key, entry in state.items()}
    return [to_plain(entry) for entry in state] if isinstance(state, (list, tuple)) else state


def from_plain(plain: Any) -> Any:
    """What `to_plain` was given."""
    if isinstance(plain, list):
        return [from_plain(entry) for entry in plain]
    if not isinstance(plain, dict):
        return plain
    if _TENSOR not in plain:
        return {key: from_plain(entry) for key, entry in plain.items()}
    data = np.frombuffer(zlib.decompress(base64.b64decode(plain[_TENSOR])), np.uint8)
    if plain["bool"]:
        flat = torch.from_numpy(np.unpackbits(data, count=plain["count"]).astype(bool))
    else:
        flat = torch.from_numpy(data.copy())
    if "dtype" not in plain:  # written before there were others than vectors of bool and uint8
        return flat
    dtype, shape = getattr(torch, plain["dtype"]), plain["shape"]
    return flat.view(dtype).view(shape) if flat.numel() else torch.empty(shape, dtype=dtype)
