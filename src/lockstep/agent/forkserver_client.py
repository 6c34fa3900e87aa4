"""Nurseries, as those see them who start them: processes that answer over a channel.

A nursery is started as a process of its own, or cloned from one that is there: the one that has
loaded a task, for a trial, or one that has loaded torch alone, for many runs (`preloaded`).
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from lockstep.errors import WorkerLostError, from_message
from lockstep.system.unix_channel import Channel, Closed, Message

LOAD_SECONDS = 600.0
"""The longest that importing torch, or building the task and its data, may take."""
LOOK_SECONDS = 0.5
FORK_SECONDS = 30.0
"""How long it may take to fork, on a machine that has much else to do."""
END_SECONDS = 5.0
STDERR = 2


class ForkServerClient:
    """A nursery and the conversation with it, which is for one thread at a time."""

    def __init__(
        self,
        channel: Channel,
        pid: int,
        pidfd: int,
        *,
        child: subprocess.Popen[bytes] | None = None,
        parent: ForkServerClient | None = None,
    ) -> None:
        """It is this process's `child`, or the clone of a `parent`."""
        self.channel, self.pid = channel, pid
        self._pidfd, self._child, self._parent = pidfd, child, parent
        self._codes: dict[int, int] = {}
        self._cloning = threading.Lock()

    @classmethod
    def start(cls, environment: Mapping[str, str]) -> ForkServerClient:
        """Start one that has nothing loaded yet."""
        ours, theirs = Channel.pair()
        command = [
            sys.executable,
            "-m",
            "lockstep.worker.forkserver",
            str(theirs.fileno()),
            str(os.getpid()),
        ]
        child = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
        )
        theirs.close()
        return cls(ours, child.pid, os.pidfd_open(child.pid), child=child)

    def clone(self, environment: Mapping[str, str] | None = None) -> ForkServerClient:
        """Fork it, with what it has loaded; threads may do that at the same time.

        With `environment`, the clone has that, and this process's stderr, in place of its parent's.

        Raises:
            WorkerLostError: it has ended.
        """
        given = {} if environment is None else {"environment": dict(environment)}
        with self._cloning:
            request = {"op": "clone", **given}
            message, fds = self.ask(request, "cloned", FORK_SECONDS, [STDERR] if given else ())
        return ForkServerClient(Channel.from_fd(fds[0]), message["pid"], fds[1], parent=self)

    def ask(
        self, request: Message, event: str, seconds: float, fds: Sequence[int] = ()
    ) -> tuple[Message, list[int]]:
        """Send a request, and wait for the event that answers it.

        Raises:
            WorkerLostError: it has ended, or is silent for `seconds`.
            LockstepError: it could not do what it was asked to.
        """
        try:
            self.channel.send(request, fds)
        except Closed:
            raise self._lost() from None
        return self.expect(event, seconds)

    def expect(self, event: str, seconds: float) -> tuple[Message, list[int]]:
        """Wait for an event; raises as `ask` does. Time in which this process itself was stopped
        does not count."""
        left = seconds
        while True:
            while not self.channel.ready(min(left, LOOK_SECONDS)):
                left -= LOOK_SECONDS
                if left <= 0.0:
                    raise WorkerLostError(
                        f"the nursery was silent for {seconds:.0f} s",
                        expected=f"{event!r}",
                        fix="look at what the task does when it is built",
                    )
            try:
                message, fds = self.channel.receive(0.0)
            except Closed:
                raise self._lost() from None
            if message["event"] == event:
                return message, fds
            if message["event"] == "failed":
                raise from_message(message["error"])
            self._note(message)

    def hear(self) -> None:
        """Take a message that has come unasked.

        Raises:
            WorkerLostError: it has ended.
        """
        try:
            message, _ = self.channel.receive(0)
        except (Closed, TimeoutError):
            raise self._lost() from None
        self._note(message)

    def exit_code(self, pid: int, seconds: float) -> int | None:
        """How a child of the nursery has ended; None if it does not say so within `seconds`."""
        limit = time.monotonic() + seconds
        while pid not in self._codes and time.monotonic() < limit:
            try:
                message, _ = self.channel.receive(max(0.0, limit - time.monotonic()))
            except (Closed, TimeoutError):
                break
            self._note(message)
        return self._codes.get(pid)

    def _note(self, message: Message) -> None:
        if message["event"] == "exited":
            self._codes[message["pid"]] = message["code"]

    def _ends(self, seconds: float) -> bool:
        """Whether the process ends within `seconds`."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def _lost(self) -> WorkerLostError:
        code = None
        if self._child is not None and self._ends(END_SECONDS):
            code = self._child.wait()
        elif self._parent is not None:
            with self._parent._cloning:
                code = self._parent.exit_code(self.pid, END_SECONDS)
        return WorkerLostError(
            "the nursery, the parent of all workers, has ended",
            expected="a process that loads the task, and lives as long as the run",
            found="" if code is None else f"it {describe_exit(code)}",
            fix="look for os._exit or native code that crashes in what the task loads, and for "
            "the out-of-memory killer in the system's log",
        )

    def close(self) -> None:
        """End it, with its workers and clones."""
        self.channel.close()
        if not self._ends(END_SECONDS):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._ends(END_SECONDS)
        if self._child is not None:
            self._child.wait()
        os.close(self._pidfd)


def describe_exit(code: int) -> str:
    """How a process ended, in words, from its exit code."""
    return f"exited with code {code}" if code >= 0 else f"was killed by {_signal_name(-code)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"  # a real-time signal has no name
