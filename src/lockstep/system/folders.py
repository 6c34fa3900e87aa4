"""Folders: the working folder, and temporary ones that go with their owner."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import weakref
from pathlib import Path
from typing import Self

from lockstep.errors import JobError


def working_folder() -> str:
    """The folder that this process works in, from where tasks are found.

    Raises:
        JobError: it is gone.
    """
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise JobError(
            "the folder that this process works in is gone",
            expected="a folder that is there: tasks are found from it, and workers work in it",
            found="it was deleted, or another one has taken its place",
            fix="cd to a folder that is there, and start again",
        ) from None


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path as a user gives it: `~` is the home, which a shell leaves alone in `--out=~/run`."""
    return Path(os.path.expanduser(path))


def user_cache() -> Path:
    """The user's cache of Lockstep's: `$XDG_CACHE_HOME/lockstep`. It may not be there yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "lockstep"


LOCK, UNLOCKED = "lock", "lock.new"
"""The owner holds a lock on the first, which has that from the beginning: it is made as the second.
The kernel lets go of it when the owner has died, which no process id tells where containers share
a folder."""


class TemporaryFolder:
    """A private folder that goes with its owner. Use it as a context manager, or `close` it."""

    def __init__(self, prefix: str, among: Path | None = None) -> None:
        """Make one with this prefix, and remove those whose owners have died. `among`: in which
        folder; None: that of temporary files."""
        among = Path(tempfile.gettempdir()) if among is None else among
        remove_abandoned(prefix, among)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=among))
        lock = os.open(self.path / UNLOCKED, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self.close = weakref.finalize(self, _remove, self.path, lock)
        """Removes it with all that is in it, once; done at the process's end, too."""
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(self.path / UNLOCKED, self.path / LOCK)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def remove_abandoned(prefix: str, among: Path) -> None:
    """Remove this user's folders of a kind whose owners have died, in a folder. Others are left
    alone, and so is what cannot be removed."""
    for path in among.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    """Raises OSError: it has no lock."""
    lock = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
    else:
        _remove(path, lock)


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)
