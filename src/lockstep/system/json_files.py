"""JSON files: atomic writes, NaN to null and back, digests of files."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from blake3 import blake3


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is whole or the old one stays."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it. Nobody is kept waiting by a pipe that somebody has put in its place.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return open(descriptor, "rb")


def file_digest(path: Path) -> str:
    """BLAKE3 of a file."""
    digest = blake3()
    digest.update_mmap(path)
    return digest.hexdigest()


def with_nan(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Metrics as JSON has them, with NaN for what was not finite."""
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def plain(content: Any) -> Any:
    """The content with null in the place of the numbers that JSON does not have."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    return content
