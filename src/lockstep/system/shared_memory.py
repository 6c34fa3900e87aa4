"""Shared memory that leaves nothing behind: anonymous files, passed on as file descriptors."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
from collections.abc import MutableMapping
from pathlib import Path

from lockstep.errors import ResourceError

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
    def create(cls, name: str, nbytes: int) -> Segment:
        """Allocate `nbytes` of zeros, at once: a shortage shows here and not as a SIGBUS later.

        Raises:
            ResourceError: there is not that much memory.
        """
        size = max(nbytes, mmap.PAGESIZE)
        what = f"the {name} segment"
        check_available(what, size)
        fd = os.memfd_create(f"lockstep-{name}", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            os.close(fd)
            raise _shortage(what, size, available_bytes()) from error
        return cls(fd, nbytes)

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


def available_bytes() -> int:
    """Memory that can still be had: the machine's, or the control group's if that is less."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        text = limit.read_text().strip()
        if text != "max":
            available = min(available, int(text) - int(used.read_text()))
    except (OSError, ValueError):
        pass  # no cgroup v2 here, or no limit
    return available


def check_available(what: str, nbytes: int) -> None:
    """Raise `ResourceError` unless `nbytes` more can be had for `what`."""
    available = available_bytes()
    if nbytes > available:
        raise _shortage(what, nbytes, available)


def _shortage(what: str, nbytes: int, available: int) -> ResourceError:
    return ResourceError(
        f"not enough memory for {what}",
        expected=f"{nbytes / 2**20:,.0f} MiB",
        found=f"{available / 2**20:,.0f} MiB available",
        fix="use fewer shards (each needs one gradient), a smaller model, or a larger machine",
    )
