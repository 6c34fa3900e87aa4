"""Board memory: where boards lie in shared memory, and the form of what is shown there.

Each member has a line of words, and two buffers that it writes to by turns. Workers of one host
map the same memory; between hosts an agent carries lines and buffers over (`board_relay`), so this
file needs no torch.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.errors import ProtocolError, ResourceError
from lockstep.system.machine import available_bytes, not_enough_memory
from lockstep.system.shared_memory import Segment

LINE = 64
"""Bytes: one cache line; each has one writer."""
LINE_WORDS = LINE // 8
STAMP, COUNT, SHARD, SIGN, SHOWN = range(5)
"""The words of a line, 8 bytes each. `SIGN` changes with every other one: waits sleep on it.
`SHOWN` counts what this member has ever shown."""
SIGN_OFFSET = SIGN * 8 + (4 if sys.byteorder == "big" else 0)
"""Bytes: where in a line the half of the sign lies that changes."""
EPOCH_SHIFT, TURN_SHIFT, EPOCH_MASK = 40, 8, (1 << 23) - 1
"""Where epoch and turn lie in a stamp, above the attempt."""
NOTHING_LEFT = -1
"""In the place of a shard: there is no other in this step."""
ALIGN = 64
CONTENT = struct.Struct("=3q")
"""The head of a buffer: kind, bytes used, number of tensors."""
ORIGIN = struct.Struct("=3q")
"""Behind it: `SHOWN` as it is with this, the stamp, and the count; nothing, while it changes."""
HEAD_BYTES = CONTENT.size + ORIGIN.size
ABSENT = -1
"""In the place of a tensor's type: there is no tensor."""
ITEM_BYTES = (4, 8, 2, 2, 8, 16, 8, 4, 2, 1, 1, 1)
"""By number of a type, the bytes of an element."""
MOST_DIMENSIONS = 64


class Buffer:
    """A file of shared memory, mapped as far as it is needed."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.remap()

    def grow(self, nbytes: int) -> None:
        """Have room for so many bytes. Called by the writer.

        Raises:
            ResourceError: there is not that much memory.
        """
        if nbytes <= len(self.map):
            return
        size = 1 << (nbytes - 1).bit_length()
        try:
            os.posix_fallocate(self.fd, 0, size)
        except OSError as error:
            raise not_enough_memory("a team's board", size, available_bytes()) from error
        self.remap()

    def see(self, nbytes: int) -> None:
        """See so many bytes, which the writer has made room for."""
        if nbytes > len(self.map):
            self.remap()

    def close(self) -> None:
        """Unmap it, as soon as nobody looks at it any more."""
        with contextlib.suppress(BufferError):
            self.map.close()

    def remap(self) -> None:
        """Map all of it that there is."""
        self.map = mmap.mmap(self.fd, os.fstat(self.fd).st_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class BoardMemory:
    """The memory of all boards of a host. Made in the forkserver, inherited by its forks."""

    words: Segment
    fds: tuple[tuple[int, int], ...]
    """By member, the files of its two buffers."""

    @staticmethod
    def create(members: int) -> BoardMemory:
        """Allocate the words, and empty buffers.

        Raises:
            ResourceError: there is not that much memory, or not so many file descriptors.
        """
        words = Segment.create("team words", members * LINE)
        fds: list[int] = []
        try:
            for number in range(2 * members):
                fds.append(os.memfd_create(f"lockstep-team-{number // 2}", os.MFD_CLOEXEC))
                os.posix_fallocate(fds[-1], 0, mmap.PAGESIZE)
        except OSError as error:
            for fd in fds:
                os.close(fd)
            words.close()
            raise ResourceError(
                f"the boards of teams cannot be allocated: {error}",
                expected=f"{2 * members} file descriptors, two for each worker that there may "
                "be, and a page of memory for each",
                fix="set max_workers to fewer, or look at ulimit -n",
            ) from error
        return BoardMemory.of(words, fds)

    @staticmethod
    def of(words: Segment, fds: Sequence[int]) -> BoardMemory:
        """What another process has allocated."""
        return BoardMemory(words=words, fds=tuple(zip(fds[::2], fds[1::2], strict=True)))

    @property
    def all_fds(self) -> list[int]:
        """The descriptors to be passed on: the words', and two of each member."""
        return [self.words.fd, *(fd for pair in self.fds for fd in pair)]

    def close(self) -> None:
        """Let go of it all."""
        for pair in self.fds:
            for fd in pair:
                os.close(fd)
        self.words.close()


def aligned(nbytes: int) -> int:
    """The next place at which a tensor may begin."""
    return -(-nbytes // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True)
class TensorHead:
    """What is said of a tensor in a buffer."""

    number: int
    """Of its type, or `ABSENT`."""
    form: tuple[int, ...]
    """Sizes, then strides, in elements."""
    data: int
    """Where it lies."""

    @staticmethod
    def at(buffer: memoryview | mmap.mmap, offset: int) -> TensorHead:
        number, dims = struct.unpack_from("=2q", buffer, offset)
        form = struct.unpack_from(f"={2 * dims}q", buffer, offset + 16)
        return TensorHead(number, form, aligned(offset + 16 + 16 * dims))

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.form[: len(self.form) // 2]

    @property
    def end(self) -> int:
        """Where the next one begins."""
        if self.number == ABSENT:
            return self.data
        return aligned(self.data + math.prod(self.sizes) * ITEM_BYTES[self.number])


def check_shown(host: str, shown: memoryview) -> None:
    """Check what a host shows: a worker reads tensors where it says that they are.

    Raises:
        ProtocolError: they do not lie within.
    """
    with contextlib.suppress(struct.error, OverflowError):
        _, used, count = CONTENT.unpack_from(shown)
        if used == len(shown) and _all_within(shown, count):
            return
    raise ProtocolError(f"host {host} shows tensors that do not lie within what has come of them")


def _all_within(shown: memoryview, count: int) -> bool:
    at, found = HEAD_BYTES, 0
    while found < count:
        head = TensorHead.at(shown, at)
        if not _possible(head) or head.end > len(shown):
            return False
        at, found = head.end, found + 1
    return found == count


def _possible(head: TensorHead) -> bool:
    """Whether there is such a type, and the tensor is dense: else it would reach beyond its end."""
    sizes, strides = head.sizes, head.form[len(head.sizes) :]
    if head.number == ABSENT:
        return not head.form
    if not 0 <= head.number < len(ITEM_BYTES) or len(sizes) > MOST_DIMENSIONS:
        return False
    if min(head.form, default=0) < 0:
        return False
    reach = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    elements = math.prod(sizes)
    return not elements or reach <= elements
