"""Reading a file only when its content has the expected checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from offpath.studies.data.errors import DataError
from offpath.studies.data.idx import gunzip


def check_sha256(content: bytes, sha256: str, source: str, next_step: str) -> None:
    """Raise `DataError`, naming `source`, where `content` does not have the checksum `sha256`."""
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256:
        raise DataError(f"{source} to have SHA-256 {sha256}", f"{actual} ({len(content)} bytes)", next_step)


def read_bytes(path: Path, next_step: str) -> bytes:
    """Return the content of `path`; raises `DataError` where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} to be readable", str(error), next_step) from error


def read_verified(path: Path, sha256: str, source: str, next_step: str) -> bytes:
    """Return the decompressed content of `path`, whose checksum is `sha256`.

    The checksum is that of the decompressed content, since each distributor compresses in its own way.
    Raises `DataError`, naming `source`, for an unreadable, truncated, corrupt or different file.
    """
    content = gunzip(read_bytes(path, next_step), source, next_step)
    check_sha256(content, sha256, f"{source}, decompressed,", next_step)
    return content


def read_known(path: Path, sha256: Mapping[str, str], next_step: str) -> tuple[bytes, str]:
    """Return the content of `path` and its version, by the table `sha256` of checksums and what they belong to.

    Raises `DataError` for an unreadable file and for one that is in no row of the table.
    """
    content = read_bytes(path, next_step)
    actual = hashlib.sha256(content).hexdigest()
    if actual not in sha256:
        versions = " or ".join(sha256.values())
        raise DataError(f"{path} to be of {versions}", f"SHA-256 {actual} ({len(content)} bytes)", next_step)
    return content, sha256[actual]
