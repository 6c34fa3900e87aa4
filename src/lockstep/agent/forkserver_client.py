"""Forkserver client: starts a forkserver, or clones one, and asks it for things over a channel.

One is cloned where there is one that has loaded a task, for a trial, or torch alone, for many runs
(`preloaded`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TypeVar

from lockstep.errors import WorkerLostError
from lockstep.planning.forkserver_messages import (
    Answer,
    ChildExited,
    CloneServer,
    Request,
    RequestFailed,
    ServerCloned,
    ToForkServer,
    to_forkserver,
)
from lockstep.system.processes import ends_within
from lockstep.system.unix_channel import Channel, Closed

LOAD_SECONDS = 600.0
"""The longest that importing torch, or building the task and its data, may take."""
LOOK_SECONDS = 0.5
FORK_SECONDS = 30.0
"""How long it may take to fork, on a machine that has much else to do."""
END_SECONDS = 5.0
STDERR = 2


A = TypeVar("A", bound=Answer)


class ForkServerClient:
    """A forkserver and the conversation with it, which is for one thread at a time."""

    def __init__(
        self,
        channel: ToForkServer,
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
        own_end, child_end = Channel.pair()
        command = [
            sys.executable,
            "-m",
            "lockstep.worker.forkserver_loop",
            str(child_end.fileno()),
            str(os.getpid()),
        ]
        child = subprocess.Popen(
            command, pass_fds=[child_end.fileno()], env=environment, stdin=subprocess.DEVNULL
        )
        child_end.close()
        return cls(to_forkserver(own_end), child.pid, os.pidfd_open(child.pid), child=child)

    def clone(self, environment: Mapping[str, str] | None = None) -> ForkServerClient:
        """Fork it, with what it has loaded; threads may do that at the same time.

        With `environment`, the clone has that, and this process's stderr, in place of its parent's.

        Raises:
            WorkerLostError: it has ended.
        """
        given: dict[bytes, bytes] | None = None
        if environment is not None:
            given = {os.fsencode(name): os.fsencode(environment[name]) for name in environment}
        fds = [] if given is None else [STDERR]
        with self._cloning:
            request = CloneServer(environment=given)
            cloned, (channel_fd, pidfd) = self.ask(request, ServerCloned, FORK_SECONDS, fds)
        channel = to_forkserver(Channel.from_fd(channel_fd))
        return ForkServerClient(channel, cloned.pid, pidfd, parent=self)

    def ask(
        self, request: Request, answer: type[A], seconds: float, fds: Sequence[int] = ()
    ) -> tuple[A, list[int]]:
        """Send a request, and wait for the answer, of this type.

        Raises:
            WorkerLostError: it has ended, or is silent for `seconds`.
            LockstepError: it could not do what it was asked to.
        """
        try:
            self.channel.send(request, fds)
        except Closed:
            raise self._lost() from None
        return self.expect(answer, seconds)

    def expect(self, answer: type[A], seconds: float) -> tuple[A, list[int]]:
        """Wait for an answer; raises as `ask` does. Time in which this process itself was stopped
        does not count."""
        left = seconds
        while True:
            while not self.channel.ready(min(left, LOOK_SECONDS)):
                left -= LOOK_SECONDS
                if left <= 0.0:
                    raise WorkerLostError(
                        f"the forkserver was silent for {seconds:.0f} s",
                        expected=answer.__name__,
                        fix="look at what the task does when it is built",
                    )
            try:
                message, fds = self.channel.receive(0.0)
            except Closed:
                raise self._lost() from None
            if isinstance(message, answer):
                return message, fds
            if isinstance(message, RequestFailed):
                raise message.error.error()
            self._note(message)

    def hear(self) -> None:
        """Take what has come unasked, if `ask` has not met it while it waited for an answer.

        Raises:
            WorkerLostError: it has ended.
        """
        try:
            while self.channel.ready():
                message, _ = self.channel.receive()
                self._note(message)
        except Closed:
            raise self._lost() from None

    def exit_code(self, pid: int, seconds: float) -> int | None:
        """How a child of the forkserver has ended; None if it does not say so within `seconds`."""
        limit = time.monotonic() + seconds
        while pid not in self._codes and time.monotonic() < limit:
            try:
                message, _ = self.channel.receive(max(0.0, limit - time.monotonic()))
            except (Closed, TimeoutError):
                break
            self._note(message)
        return self._codes.get(pid)

    def _note(self, message: Answer) -> None:
        if isinstance(message, ChildExited):
            self._codes[message.pid] = message.code

    def _lost(self) -> WorkerLostError:
        code = None
        if self._child is not None and ends_within(self._pidfd, END_SECONDS):
            code = self._child.wait()
        elif self._parent is not None:
            with self._parent._cloning:
                code = self._parent.exit_code(self.pid, END_SECONDS)
        return WorkerLostError(
            "the forkserver, the parent of all workers, has ended",
            expected="a process that loads the task, and lives as long as the run",
            found="" if code is None else f"it {describe_exit(code)}",
            fix="look for os._exit or native code that crashes in what the task loads, and for "
            "the out-of-memory killer in the system's log",
        )

    def close(self) -> None:
        """End it, with its workers and clones."""
        self.channel.close()
        if not ends_within(self._pidfd, END_SECONDS):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            ends_within(self._pidfd, END_SECONDS)
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
