"""Fork setup: what a fork of the forkserver does before it is a worker, a clone or a check."""

from __future__ import annotations

import signal
import sys

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
