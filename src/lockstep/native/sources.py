"""Sources of the native path, and the name of the library that is made of them."""

from __future__ import annotations

import hashlib
import os
import platform
import stat
import sys
from importlib.metadata import version
from pathlib import Path

from lockstep.system.folders import user_cache

MODULE = "lockstep_native"
"""What the library is called as a module of Python's."""
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
"""For the compiler. None of them is about arithmetic: that is in PyTorch's own libraries."""


def source_files() -> list[Path]:
    """All C++ files, headers too, in a fixed order."""
    folder = Path(__file__).parent
    return sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])


def library_path() -> Path:
    """Where the library lies once it is built. Its name is a digest of all that it depends on: what
    was built of other sources, or for another torch or Python, has another one.

    Raises:
        RuntimeError: this user has no home.
    """
    digest = hashlib.sha256()
    facts = (version("torch"), sys.implementation.cache_tag, platform.machine(), *FLAGS)
    for part in (*map(str.encode, facts), *(path.read_bytes() for path in source_files())):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return user_cache() / "native" / f"{digest.hexdigest()[:32]}.so"


def foreign(path: Path) -> str:
    """Why a library is not to be trusted: others may have written it; empty if they cannot have.

    Raises:
        OSError: it is not there.
    """
    for each, is_kind in ((path.parent, stat.S_ISDIR), (path, stat.S_ISREG)):
        found = os.lstat(each)
        if not is_kind(found.st_mode):
            return f"{each} is not what it should be"
        if found.st_uid != os.geteuid():
            return f"{each} is another user's"
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"others may write to {each}"
    return ""
