"""Whether a layer is swapped, and why, in numbers."""

from __future__ import annotations

from collections.abc import Sequence

from offpath.convert.compress.report import Measured, tokens_in_words

GOALS = ("speed", "size")


def decide(
    goal: str, measured: Sequence[Measured], whole_pass: bool, bytes_before: int, bytes_after: int
) -> tuple[bool, str]:
    """(swap it, the reason).

    For "speed", a layer is swapped if it is slower with none of the inputs; of a `whole_pass`, if all its calls
    together are not. For "size", if it gets smaller.

    >>> decide("speed", [Measured(1, 1, 2e-3, 1e-3), Measured(256, 1, 1.2e-3, 1.4e-3)], False, 100, 50)
    (False, 'dense is faster here: 1.2 ms against 1.4 for 256 tokens')
    >>> decide("size", [Measured(256, 1, 1.2e-3, 1.4e-3)], False, 100, 50)
    (True, '100 bytes before, 50 after')
    """
    if goal == "size":
        if bytes_after < bytes_before:
            return True, f"{bytes_before:,} bytes before, {bytes_after:,} after"
        return False, f"sparse, it would take {bytes_after:,} bytes instead of {bytes_before:,}"
    if whole_pass:
        dense, sparse = (sum(m.calls * s for m, s in zip(measured, times, strict=True)) for times in _times(measured))
        rivals = [(dense, sparse, "all its calls")]
    else:
        rivals = [(m.dense_seconds, m.sparse_seconds, tokens_in_words(m.tokens)) for m in measured]
    slower = [f"{d * 1e3:.3g} ms against {s * 1e3:.3g} for {what}" for d, s, what in rivals if s > d]
    if slower:
        return False, f"dense is faster here: {', '.join(slower)}"
    return True, ", ".join(f"{d / s:.2f} times as fast for {what}" for d, s, what in rivals)


def _times(measured: Sequence[Measured]) -> tuple[list[float], list[float]]:
    return [m.dense_seconds for m in measured], [m.sparse_seconds for m in measured]
