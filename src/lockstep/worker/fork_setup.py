"""Fork setup: what a fork of the forkserver does before it is a worker, a clone or a check."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

from lockstep.system.processes import die_with_parent, own_file_positions
from lockstep.system.unix_channel import Channel


def flush() -> None:
    """Write what is buffered, so that a fork does not write it again."""
    sys.stdout.flush()
    sys.stderr.flush()


def in_child(parent: int, inherited: list[Channel]) -> None:
    """Make a forked child independent of the forkserver's own business."""
    die_with_parent(parent)
    ignore_signals()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for channel in inherited:
        channel.close()
    own_file_positions()


def ask_fork(answer: Callable[[], bytes], seconds: int) -> bytes:
    """What a fork of this process answers, which then ends; empty if it does not answer.

    The fork does what this process must not do itself. It has so many seconds, and dies with this
    process.
    """
    reading, writing = os.pipe()
    flush()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        try:
            in_child(parent, [])
            os.close(reading)
            signal.alarm(seconds)  # ends it
            with open(writing, "wb") as file:
                file.write(answer())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        said = file.read()
    os.waitpid(child, 0)
    return said


def _leave_to_agent(number: int, frame: object) -> None:
    pass


def ignore_signals() -> None:
    """Leave SIGTERM and SIGHUP to the agent."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave_to_agent)


def restore_signals() -> None:
    """Put the default of SIGTERM and SIGHUP back, in what the task itself starts."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == _leave_to_agent:
            signal.signal(number, signal.SIG_DFL)
