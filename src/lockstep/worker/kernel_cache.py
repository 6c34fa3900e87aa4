"""Kernel cache: machine code that was compiled earlier, in the user's cache.

By default the compiler keeps it in a folder of /tmp that others may write to, and takes what is
there for good: a file that was cut short as its process was killed, or that others have put there.
Here a folder appears under its name once everything in it is whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lockstep.system.folders import user_cache

ABANDONED_SECONDS = 24 * 3600.0
"""So old is a folder whose process was killed while it was filled."""
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Where the compiler is told its folder."""


@contextlib.contextmanager
def kernels_in(key: str) -> Iterator[Path]:
    """Let the compiler work in the folder of what it is to compile, which `key` is a digest of.

    It is filled under another name, and gets its own if nothing fails.
    """
    root = user_cache() / "kernels"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    _remove_abandoned(root)
    whole = root / key
    if whole.is_dir():
        os.environ[VARIABLE] = str(whole)
        yield whole
        return
    partial = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=root))
    os.environ[VARIABLE] = str(partial)
    try:
        yield partial
        with contextlib.suppress(OSError):  # another run was quicker
            os.rename(partial, whole)
        os.environ[VARIABLE] = str(whole)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(root: Path) -> None:
    for partial in root.glob("*.*"):
        with contextlib.suppress(OSError):
            if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(partial, ignore_errors=True)
