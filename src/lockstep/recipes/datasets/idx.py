"""IDX: the format of MNIST's files, a magic number, the sizes, and the elements."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.data.user_files import GZIP
from lockstep.errors import DataError

UNSIGNED_BYTES = 0x08


def to_idx(array: NDArray[np.uint8]) -> bytes:
    """`array` as an IDX file."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, UNSIGNED_BYTES, array.ndim]) + sizes + array.tobytes()


def from_idx(content: bytes, source: str | Path) -> NDArray[np.uint8]:
    """The array in an IDX file of bytes, packed by gzip or not.

    Args:
        content: the file.
        source: its name, for messages.

    Raises:
        DataError: it is not such a file.
    """
    try:
        if content.startswith(GZIP):
            content = gzip.decompress(content)
        zero, kind, axes = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{axes}I", content, 4)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise _unusable(source, f"{type(error).__name__}: {error}") from error
    if zero != 0 or kind != UNSIGNED_BYTES or not axes:
        raise _unusable(source, f"the magic number {content[:4].hex()}")
    start, count = 4 + 4 * axes, math.prod(shape)
    if len(content) != start + count:
        raise _unusable(source, f"{len(content)} bytes, sizes {list(shape)}")
    found: NDArray[Any] = np.frombuffer(content, np.uint8, offset=start)
    return found.reshape(shape)


def _unusable(source: str | Path, found: str) -> DataError:
    return DataError(
        f"{source} is not an IDX file of bytes",
        expected="00 00 08, the number of axes, their sizes (32 bits, big-endian), the bytes",
        found=found,
        fix="look at where it comes from, or name another one",
    )
