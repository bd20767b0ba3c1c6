"""How a kernel refuses."""

from __future__ import annotations


class KernelError(ValueError):
    """A kernel was asked for something that it does not compute; nothing was computed instead."""
