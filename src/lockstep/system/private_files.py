"""Private files: written for this user alone, whole or not at all, and seen when they change."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only this user may read, and that was not there before."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def replace_private(path: Path, content: bytes) -> None:
    """Write such a file in one go, perhaps in the place of another one."""
    fresh = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
    fresh.unlink(missing_ok=True)
    try:
        write_private(fresh, content)
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def file_stamp(path: Path) -> tuple[int, int, int] | None:
    """What is another one when a file has been replaced; None: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
