"""Parsing the IDX format of unsigned bytes, plain or gzip-compressed."""

from __future__ import annotations

import gzip
import math
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from offpath.studies.data.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
UNSIGNED_BYTE = 0x08
INTACT_COPY = "replace it with an intact copy"


def gunzip(content: bytes, source: str, next_step: str = INTACT_COPY) -> bytes:
    """Return `content` decompressed, or unchanged where it is not gzip.

    `source` names the content in errors. Raises `DataError` for a truncated or corrupt gzip stream.
    """
    # The content decides, not the file name: an IDX file starts with two zero bytes, never with these.
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{source} to be a whole gzip stream", str(error), next_step) from error


def parse_idx(content: bytes, dimensions: int, source: str, next_step: str = INTACT_COPY) -> NDArray[np.uint8]:
    """Return the array that an IDX file of unsigned bytes holds.

    `content` is the file, plain or gzip-compressed; the result is uint8 with `dimensions` axes and is
    read-only. Raises `DataError`, naming `source`, for a wrong magic number, a header or body of the wrong
    length, or an axis of size 0. Source: the format description on the MNIST home page.
    """
    content = gunzip(content, source, next_step)
    magic = bytes((0, 0, UNSIGNED_BYTE, dimensions))
    if content[:4] != magic:
        raise DataError(
            f"{source} to start with the IDX magic number 0x{magic.hex()}",
            f"0x{content[:4].hex()}",
            next_step,
        )
    header_bytes = 4 + 4 * dimensions
    if len(content) < header_bytes:
        raise DataError(f"{source} to have an IDX header of {header_bytes} bytes", f"{len(content)} bytes", next_step)
    shape = struct.unpack(f">{dimensions}I", content[4:header_bytes])
    if 0 in shape:
        raise DataError(f"{source} to hold at least one element", f"shape {shape}", next_step)
    expected_bytes = header_bytes + math.prod(shape)
    if len(content) != expected_bytes:
        raise DataError(f"{source} to be {expected_bytes} bytes for shape {shape}", f"{len(content)} bytes", next_step)
    return np.frombuffer(content, dtype=np.uint8, offset=header_bytes).reshape(shape)
