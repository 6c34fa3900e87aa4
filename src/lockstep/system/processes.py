"""Small things that processes need in order to die together and leave nothing behind."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import stat
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent dies.

    `parent` is the parent's process id as the parent knew it; if it has died already, this
    process ends at once.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def parent_of(pid: int) -> int:
    """The process id of a process's parent."""
    return int(_stat(pid)[1])


def start_time(pid: int) -> int:
    """When a process was started, in the kernel's clock ticks since the machine was; 0: there is no
    such process. No two processes of one id have the same."""
    try:
        return int(_stat(pid)[19])
    except (OSError, ValueError, IndexError):
        return 0


def private_bytes(pid: int) -> int:
    """How much memory a process has of its own: resident, and neither shared nor of a file. What a
    fork has not written to since counts, too. 0: there is no such process."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except (OSError, ValueError):
        return 0
    return max(resident - shared, 0) * os.sysconf("SC_PAGE_SIZE")


def _stat(pid: int) -> list[str]:
    """What the kernel says of a process, from its state on. The name before may be anything."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()


def ends_within(pidfd: int, seconds: float) -> bool:
    """Whether a process ends within so many seconds."""
    poll = select.poll()  # select() takes no descriptors from 1024 on
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(seconds, 0.0) * 1000))


def own_file_positions() -> None:
    """Give this process positions of its own in the files that it has inherited to read.

    A fork shares each open file's position with its parent, so two that seek and read in a data
    set's file would get each other's bytes. Called in each fork, before it reads anything.
    """
    for entry in os.listdir("/proc/self/fd"):
        fd = int(entry)
        with contextlib.suppress(OSError):  # the descriptor that lists, or one that cannot be had
            reads = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            if not reads or not stat.S_ISREG(os.fstat(fd).st_mode):
                continue
            again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.lseek(again, os.lseek(fd, 0, os.SEEK_CUR), os.SEEK_SET)
                os.dup2(again, fd, inheritable=os.get_inheritable(fd))
            finally:
                os.close(again)


GPU_FILES = "/dev/nvidia"
"""What the names of a GPU's device files begin with."""


def close_device_files(beginning: str = GPU_FILES) -> None:
    """Close what this process has inherited of a GPU's device files.

    A loader is forked by a worker that may have a GPU open; with the descriptors it would keep the
    dead worker's memory there from being freed. Nothing of CUDA may be called afterwards.
    """
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor that lists
            if os.readlink(f"/proc/self/fd/{entry}").startswith(beginning):
                os.close(int(entry))


@contextlib.contextmanager
def stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at the first signal; a second one raises `KeyboardInterrupt`.

    A SIGHUP that is ignored, as under nohup, stays ignored. To be used in the main thread.
    """
    before: dict[int, Any] = {}

    def signalled(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.default_int_handler)
        stop()

    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN:
            before[each] = signal.signal(each, signalled)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
