"""The IDX format: what is read is what was written, and what is damaged is refused."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from data_files import idx_bytes
from offpath.studies.data import DataError
from offpath.studies.data.idx import parse_idx


@given(
    array=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, max_side=6)),
    compressed=st.booleans(),
)
def test_idx_round_trip(array: np.ndarray, compressed: bool) -> None:
    content = idx_bytes(array)
    parsed = parse_idx(gzip.compress(content) if compressed else content, array.ndim, "file")
    assert parsed.dtype == np.uint8
    assert parsed.shape == array.shape
    assert np.array_equal(parsed, array)


@given(array=hnp.arrays(np.uint8, (2, 3, 2)), data=st.data())
def test_idx_cut_anywhere_is_rejected(array: np.ndarray, data: st.DataObject) -> None:
    for content in (idx_bytes(array), gzip.compress(idx_bytes(array))):
        cut = data.draw(st.integers(0, len(content) - 1))
        with pytest.raises(DataError, match="the-file"):
            parse_idx(content[:cut], 3, "the-file")


WHOLE_IDX = idx_bytes(np.arange(12).reshape(2, 3, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "magic number 0x00000803; got 0x;"),
        (idx_bytes(np.arange(12)), "magic number 0x00000803; got 0x00000801"),
        (b"\x00\x00\x0d\x03" + WHOLE_IDX[4:], "magic number 0x00000803; got 0x00000d03"),
        (WHOLE_IDX[:10], "header of 16 bytes; got 10 bytes"),
        (WHOLE_IDX[:-1], r"28 bytes for shape \(2, 3, 2\); got 27 bytes"),
        (WHOLE_IDX + b"\x00", r"28 bytes for shape \(2, 3, 2\); got 29 bytes"),
        (idx_bytes(np.zeros((0, 3, 2))), r"at least one element; got shape \(0, 3, 2\)"),
        (b"\x1f\x8b" + b"garbage" * 9, "whole gzip stream"),
        (gzip.compress(WHOLE_IDX, mtime=0)[:-9], "whole gzip stream"),
        (gzip.compress(WHOLE_IDX, mtime=0)[:-8] + bytes(8), "whole gzip stream.*CRC"),
    ],
)
def test_malformed_idx_is_rejected(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"(?s)the-file.*{message}.*next step: replace it"):
        parse_idx(content, 3, "the-file")
