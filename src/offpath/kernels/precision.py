"""In what torch may multiply float32: a setting of the user's, which changes what a dense product costs.

Since torch 2.9 it can be set for each kind of device and product, and the getter of old refuses to answer a process
that does so: https://docs.pytorch.org/docs/stable/notes/cuda.html
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# What the setting of old means, on the CPU and on CUDA devices.
_OF_OLD = {"highest": ("ieee", "ieee"), "high": ("tf32", "tf32"), "medium": ("bf16", "tf32")}


def float32_precision(device_type: str) -> str:
    """What the operands of a float32 product may be rounded to on a device: "ieee" (not at all), "tf32" or "bf16".

    >>> float32_precision("cpu")
    'ieee'
    """
    found = getattr(_setting(device_type), "fp32_precision", None)
    if found is None:
        return _OF_OLD[torch.get_float32_matmul_precision()][device_type == "cuda"]
    return "ieee" if found == "none" else str(found)


@contextmanager
def multiplied_in_tf32() -> Iterator[None]:
    """Let products of float32 on CUDA devices round to TF32 while the block runs."""
    setting = _setting("cuda")
    name, wanted = ("fp32_precision", "tf32") if hasattr(setting, "fp32_precision") else ("allow_tf32", True)
    before = getattr(setting, name)
    setattr(setting, name, wanted)
    try:
        yield
    finally:
        setattr(setting, name, before)


def _setting(device_type: str) -> Any:
    """Where torch keeps it; an older torch has nothing for the CPU."""
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    return getattr(backend, "matmul", None)
