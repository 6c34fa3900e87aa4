"""Forkserver loop: the process's entry point, and how it hears its agent and its children."""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys

from lockstep.planning.forkserver_messages import (
    LoadTask,
    Request,
    RequestFailed,
    SetUp,
    to_client,
)
from lockstep.system.process_title import set_title
from lockstep.system.processes import die_with_parent
from lockstep.system.unix_channel import Channel, Closed
from lockstep.worker.error_report import describe_error
from lockstep.worker.fork_setup import flush, ignore_signals, restore_signals
from lockstep.worker.forkserver import ForkServer


def serve(forkserver: ForkServer) -> bool:
    """Answer requests until the agent closes the channel; true in a clone: serve its own agent."""
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        while True:
            poll = select.poll()
            for fd in (forkserver.channel.fileno(), wake_read, *forkserver.computing):
                poll.register(fd, select.POLLIN)
            ready = {fd for fd, _ in poll.poll()}
            if wake_read in ready:
                os.read(wake_read, 4096)
                forkserver.reap()
            if forkserver.channel.fileno() in ready:
                request, fds = forkserver.channel.receive()
                if _answer(forkserver, request, fds):
                    return True
            for fd in ready & forkserver.computing.keys():
                forkserver.compute_again(fd)
    except Closed:
        forkserver.end()
        return False
    finally:
        os.close(wake_read)
        os.close(wake_write)


def _answer(forkserver: ForkServer, request: Request, fds: list[int]) -> bool:
    """As `ForkServer.answer`; an error becomes a message."""
    try:
        return forkserver.answer(request, fds)
    except Closed:
        raise
    except (Exception, SystemExit) as error:  # a file may call sys.exit() when it is imported
        doing = {LoadTask: "loading", SetUp: "being set up"}.get(type(request), "at work")
        forkserver.channel.send(RequestFailed(error=describe_error(error, doing)))
        return False


def _end_at_once(forkserver: int) -> None:
    """End without clearing torch's modules away one by one: half a second, and the agent waits."""
    if os.getpid() == forkserver:
        flush()
        os._exit(0)


def main() -> None:
    """Entry point of the process: `python -m lockstep.worker.forkserver_loop FD PARENT`."""
    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent decides what Ctrl-C means
    # Nor do SIGTERM and SIGHUP end anything here: they may have gone to all processes of a job at
    # once, and the process that started it, which has them too, stops with a checkpoint. What the
    # task itself starts can be terminated as ever: a handler does not outlive an exec, and a fork
    # puts the default back.
    ignore_signals()
    os.register_at_fork(after_in_child=restore_signals)
    set_title("forkserver")
    os.dup2(2, 1)  # what the user's code prints is not the run's output
    forkserver = ForkServer(to_client(Channel.from_fd(fd)))
    try:
        while True:
            # Comes after what the task registers later; in a clone, in place of what it had before.
            atexit.register(_end_at_once, os.getpid())
            if not serve(forkserver):
                break
    except BaseException:
        atexit.unregister(_end_at_once)  # it would hide the exit code
        raise


if __name__ == "__main__":
    main()
