"""Shared memory that leaves nothing behind: anonymous files, passed on as file descriptors."""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path

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
        self.is_on_disk = not os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")
        self.map = mmap.mmap(fd, max(nbytes, mmap.PAGESIZE))

    @classmethod
    def on_disk(cls, name: str, nbytes: int) -> Segment:
        """The same in a file that has no name: its pages can be written out where memory is short.

        Raises:
            ResourceError: there is no folder to write to.
        """
        try:
            with tempfile.TemporaryFile(prefix=f"lockstep-{name}-", dir=_disk_folder()) as file:
                os.ftruncate(file.fileno(), max(nbytes, mmap.PAGESIZE))
                return cls(os.dup(file.fileno()), nbytes)
        except OSError as error:
            raise ResourceError(
                f"the {name} segment cannot be put on a disk: {error}",
                expected=f"room for {nbytes:,} bytes in {_disk_folder()}",
                fix="set TMPDIR to a folder on a disk with more room",
            ) from error

    @classmethod
    def create(cls, name: str, nbytes: int, *, at_once: bool = True) -> Segment:
        """Allocate `nbytes` of zeros, at once: a shortage shows here and not as a SIGBUS later; or
        as they are `reserve`d, of which nothing is checked here.

        Raises:
            ResourceError: there is not that much memory.
        """
        size = max(nbytes, mmap.PAGESIZE)
        what = f"the {name} segment"
        if at_once:
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

    def release(self, start: int, nbytes: int) -> None:
        """Give the memory of a part of it back, as far as whole pages go. It reads as zeros."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (start + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last:
            self.map.madvise(mmap.MADV_REMOVE, first, last - first)

    def peek(self, start: int, nbytes: int) -> bytes:
        """A copy of a part. What nobody has written is zeros, and takes no memory for being read,
        as it would through the map."""
        pieces = []
        while nbytes and (piece := os.pread(self.fd, nbytes, start)):
            pieces.append(piece)
            start, nbytes = start + len(piece), nbytes - len(piece)
        return b"".join(pieces)

    def read(self, start: int, into: memoryview) -> None:
        """Copy a part. Of a file on a disk no page stays in memory for it."""
        if not self.is_on_disk:
            into[:] = memoryview(self.map)[start : start + len(into)]
            return
        done = 0
        while done < len(into) and (count := os.preadv(self.fd, [into[done:]], start + done)):
            done += count
        self.settle(start, len(into))

    def write(self, start: int, data: bytes | memoryview) -> None:
        """Put something into a part; of a file on a disk, at once to the disk.

        Raises:
            ResourceError: the disk is full.
        """
        if not self.is_on_disk:
            self.map[start : start + len(data)] = data
            return
        view = memoryview(data)
        try:
            while view:
                count = os.pwrite(self.fd, view, start)
                start, view = start + count, view[count:]
        except OSError as error:
            raise ResourceError(
                f"a snapshot cannot be written to {_disk_folder()}: {error}",
                expected=f"room for {self.nbytes:,} bytes",
                fix="set TMPDIR to a folder on a disk with more room",
            ) from error
        self.settle(start - len(data), len(data))

    def settle(self, start: int, nbytes: int) -> None:
        """Of a file on a disk, write a part out and let go of its pages: they would count to this
        control group's memory, and at times faster than the kernel writes them out by itself."""
        if not self.is_on_disk:
            return
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        last = min(-(-(start + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE, len(self.map))
        if first < last:
            self.map.flush(first, last - first)
            self.map.madvise(mmap.MADV_DONTNEED, first, last - first)
            os.posix_fadvise(self.fd, first, last - first, os.POSIX_FADV_DONTNEED)

    @property
    def resident_bytes(self) -> int:
        """How much memory, or disk, it takes."""
        return os.fstat(self.fd).st_blocks * 512

    def written(self) -> Iterator[tuple[int, int]]:
        """Start and end of each part that has been written to; the rest is zeros."""
        end, size = 0, len(self.map)
        while end < size:
            try:
                start = os.lseek(self.fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # there is no more
                    return
                raise
            end = os.lseek(self.fd, start, os.SEEK_HOLE)
            yield start, min(end, self.nbytes)

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


def _disk_folder() -> str:
    """Where large files may lie: /tmp may be memory itself."""
    if "TMPDIR" not in os.environ and Path("/var/tmp").is_dir():
        return "/var/tmp"
    return tempfile.gettempdir()
