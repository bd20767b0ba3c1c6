"""A checksum of everything that counts: safetensors itself would not notice a flipped bit in a weight."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256, in hexadecimal, of the JSON header and, in the order of their names, of all contiguous CPU tensors.

    A tensor adds a line of its name, dtype and shape, and its bytes.

    >>> digest("{}", {"x": torch.zeros(2)})[:8]
    '0996d587'
    """
    found = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"\n{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
