"""Kernel cache: machine code that was compiled earlier, in the user's cache.

By default the compiler keeps it in a folder of /tmp that others may write to, and takes what is
there for good: a file that was cut short as its process was killed, or that others have put there.
Here a folder appears under its name once everything in it is whole.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lockstep.system.folders import TemporaryFolder, user_cache

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Where the compiler is told its folder."""
PARTIAL = "partial."
"""The beginning of the names of folders that are being filled."""


@contextlib.contextmanager
def kernels_in(key: str) -> Iterator[Path]:
    """Let the compiler work in the folder of what it is to compile, which `key` is a digest of.

    It is filled under another name, and gets its own if nothing fails.
    """
    root = user_cache() / "kernels"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    whole = root / key
    if whole.is_dir():
        os.environ[VARIABLE] = str(whole)
        yield whole
        return
    with TemporaryFolder(PARTIAL, root) as folder:
        partial = folder.path / key
        partial.mkdir()
        os.environ[VARIABLE] = str(partial)
        yield partial
        with contextlib.suppress(OSError):  # another run was quicker
            os.rename(partial, whole)
        os.environ[VARIABLE] = str(whole)
