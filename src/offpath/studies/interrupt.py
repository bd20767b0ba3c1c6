"""Ctrl-C that waits for the end of the step."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

IMPATIENT_SECONDS = 1.0


class StopRequest:
    """Whether, and when, somebody asked for the end."""

    def __init__(self) -> None:
        self.made = False
        self.made_at_seconds = 0.0


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first Ctrl-C (or SIGTERM) inside the block into a request; one more after a second interrupts at once.

    Interrupting in the middle of an optimizer step would leave half of it done. Impatient fingers send two at a time.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if request.made and now - request.made_at_seconds > IMPATIENT_SECONDS:
            raise KeyboardInterrupt
        if not request.made:
            request.made, request.made_at_seconds = True, now

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
