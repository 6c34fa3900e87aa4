"""What a worker shares with its loader processes, besides pipes: things that have no name.

Each of Python's locks between processes is a file in /dev/shm for a moment: eleven for each worker
that starts a loader. A process that is killed in that moment leaves it there for ever.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from multiprocessing.context import ForkContext


class Nameless(ForkContext):
    """A context for a `DataLoader`. Every queue of it has one process that reads."""

    def Lock(self) -> Lock:  # type: ignore[override]
        return Lock()

    def BoundedSemaphore(self, value: int = 1) -> Unbounded:  # type: ignore[override]
        return Unbounded()

    def Event(self) -> Flag:  # type: ignore[override]
        return Flag()


class Lock:
    """One process at a time has it, of those that are forked from the one that makes it. A process
    that dies lets go of it. Threads of one process do not shut each other out."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("lockstep-lock", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Wait until it can be had; of those that may not wait, nobody else wants it."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Unbounded:
    """In the place of the semaphore that limits how much is in a queue: it never does."""

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        return True

    def release(self) -> None: ...


class Flag:
    """Set once, and seen by all processes that are forked from the one that makes it."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 1)

    def set(self) -> None:
        self._map[0] = 1

    def is_set(self) -> bool:
        return bool(self._map[0])
