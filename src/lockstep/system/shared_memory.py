"""Shared memory that leaves nothing behind: anonymous files, passed on as file descriptors."""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
from collections.abc import MutableMapping

from lockstep.errors import ResourceError
from lockstep.system.machine import available_bytes, check_available, not_enough_memory

ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""What glibc's malloc is told in processes that compute: keep what a step has freed for the next
one, in huge pages. By default it goes back to the kernel, and each step faults it in again."""


def set_allocator(environment: MutableMapping[str, str]) -> None:
    """Prepare the environment of a process that will compute; what the user has set stays."""
    for name, value in ALLOCATOR.items():
        environment.setdefault(name, value)


class Segment:
    """A run of shared memory, mapped by every process that holds its descriptor.

    It lives as long as a process maps it: nothing is left when the last one dies, however it
    dies, and containers' limits on /dev/shm do not apply.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self.fd, self.nbytes = fd, nbytes
        self.map = mmap.mmap(fd, max(nbytes, mmap.PAGESIZE))

    @classmethod
    def create(cls, name: str, nbytes: int, *, at_once: bool = True) -> Segment:
        """Allocate `nbytes` of zeros, at once: a shortage shows here and not as a SIGBUS later; or
        as they are `reserve`d.

        Raises:
            ResourceError: there is not that much memory.
        """
        size = max(nbytes, mmap.PAGESIZE)
        what = f"the {name} segment"
        check_available(what, size)
        fd = os.memfd_create(f"lockstep-{name}", os.MFD_CLOEXEC)
        try:
            if at_once:
                os.posix_fallocate(fd, 0, size)
            else:
                os.ftruncate(fd, size)
        except OSError as error:
            os.close(fd)
            if error.errno == errno.EFBIG:
                raise ResourceError(
                    f"{what} is larger than a file may be here; the limit is for memory, too",
                    expected=f"room for {size:,} bytes",
                    fix="raise the limit, as with ulimit -f unlimited",
                ) from error
            raise not_enough_memory(what, size, available_bytes()) from error
        return cls(fd, nbytes)

    def reserve(self, start: int, nbytes: int) -> None:
        """Allocate a part of it, before it is written to.

        Raises:
            ResourceError: there is not that much memory.
        """
        try:
            os.posix_fallocate(self.fd, start, nbytes)
        except OSError as error:
            raise not_enough_memory("a segment", nbytes, available_bytes()) from error

    def close(self) -> None:
        """Unmap (once no view is left) and close the descriptor."""
        os.close(self.fd)
        try:
            self.map.close()
        except BufferError:  # a view is left, perhaps in a cycle that nobody has collected yet
            gc.collect()
            with contextlib.suppress(BufferError):  # it is in use: the memory goes with it
                self.map.close()

    def __len__(self) -> int:
        return self.nbytes
