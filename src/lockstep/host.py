"""One host's nodes as the master sees them: the nursery, the workers and the shared memory."""

from __future__ import annotations

import contextlib
import os
import platform
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep import numerics
from lockstep.base import Base
from lockstep.channel import Channel, Closed, Message
from lockstep.control import Control, ControlShape
from lockstep.errors import WorkerLostError, from_message
from lockstep.exchange import SlotMap
from lockstep.layout import Layout
from lockstep.memory import Segment, set_allocator
from lockstep.planning import Plan
from lockstep.source import Source

LOAD_SECONDS = 600.0
"""The longest that building the task and its data may take."""
END_SECONDS = 5.0
STACK_SECONDS = 0.5


@dataclass
class Seat:
    """A worker process and the two descriptors that stand for it."""

    number: int
    pid: int
    channel: Channel
    pidfd: int
    alive: bool = True
    stack_fd: int = -1
    """Where the worker writes its Python stack when it is asked to."""

    def kill(self) -> None:
        """Kill the process; its end shows on the pidfd."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        """Send a signal to the process, which may have ended without our having heard of it."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def process_state(self) -> str:
        """What the kernel says of the process: running, sleeping, stopped."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return "gone"
        return next(line for line in status.splitlines() if line.startswith("State")).split("\t")[1]

    def is_stopped(self) -> bool:
        """Whether a signal has stopped the process."""
        return self.process_state().startswith("T")

    def python_stack(self) -> str:
        """The worker's Python stack, if it still answers signals."""
        if self.stack_fd < 0 or self.is_stopped():
            return ""
        limit = time.monotonic() + STACK_SECONDS
        self._send(signal.SIGUSR1)
        while os.fstat(self.stack_fd).st_size == 0 and time.monotonic() < limit:
            select.select([], [], [], 0.005)
        return os.pread(self.stack_fd, 16384, 0).decode(errors="replace")

    def close(self) -> None:
        self.channel.close()
        os.close(self.pidfd)
        if self.stack_fd >= 0:
            os.close(self.stack_fd)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that a seat's worker said (`message`), or its death (`message` is None)."""

    seat: Seat
    message: Message | None


def _search_path(shipped: str) -> list[str]:
    """Where a nursery looks for modules; first in the folder of code that was sent, if any was."""
    here = os.getcwd()
    path = [entry or here for entry in sys.path]
    return [shipped, here, *path] if shipped else path


def describe_exit(code: int) -> str:
    """How a process ended, in words, from its exit code."""
    return f"exited with code {code}" if code >= 0 else f"was killed by {_signal_name(-code)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"  # a real-time signal has no name


class Host:
    """Starts and ends the processes of one host. Use it as a context manager."""

    def __init__(self, channel: Channel, process: subprocess.Popen[bytes] | None) -> None:
        self._channel, self._process = channel, process
        self.name = platform.node() or "localhost"
        self.seats: dict[int, Seat] = {}
        self.facts: dict[str, Any] = {}
        self.layout: Layout | None = None
        self.data: Segment | None = None
        """The data sets, if they are to be sent to other hosts."""
        self._segments: list[Segment] = []
        self._exits: dict[int, int] = {}
        self.also_wake: int | None = None
        """A descriptor at which `events` returns, too, when it is readable."""

    @classmethod
    def start(
        cls,
        source: Source,
        settings: dict[str, Any],
        records: dict[str, Any] | None = None,
        *,
        networked: bool = False,
        data: Segment | None = None,
    ) -> Host:
        """Start a nursery and have it load the task.

        `records` says which file takes the place of its data: `{"path", "keep"}`. `networked`: the
        facts are to be compared with other hosts'. `data`: the data sets that the master has sent.
        """
        ours, theirs = Channel.pair()
        environment = dict(os.environ)
        numerics.set_environment(settings.get("numerics", "native"), environment)
        set_allocator(environment)
        command = [sys.executable, "-m", "lockstep.nursery", str(theirs.fileno()), str(os.getpid())]
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
        )
        theirs.close()
        host = cls(ours, process)
        fds = []
        if source.payload is not None:
            fds.append(os.memfd_create("lockstep-task", os.MFD_CLOEXEC))
            with open(fds[0], "wb", closefd=False) as file:
                file.write(source.payload)
        request = {
            "op": "load",
            "name": source.name,
            "args": dict(source.args),
            "code": source.code,
            "settings": settings,
            "records": records,
            "data": 0 if data is None else data.nbytes,
            "networked": networked,
            "folder": os.getcwd(),
            "path": _search_path(source.folder),
            "shipped": source.folder,
            "offered": source.offered,
        }
        try:
            ours.send(request, fds if data is None else [*fds, data.fd])
        finally:
            for fd in fds:
                os.close(fd)
        return host

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def known_layout(self) -> Layout:
        """Where everything lies. Asked when the host is set up."""
        assert self.layout is not None
        return self.layout

    def loaded(self) -> dict[str, Any]:
        """Wait until the task is built; the facts about it."""
        message, fds = self._expect("loaded", LOAD_SECONDS)
        self.facts = message["facts"]
        if fds:
            self.data = Segment(fds[0], message["data"])
        return self.facts

    def clone(self) -> Host:
        """A second host with the same task, for a trial."""
        self._channel.send({"op": "clone"})
        _, fds = self._expect("cloned", END_SECONDS)
        clone = Host(Channel.from_fd(fds[0]), None)
        clone.facts = self.facts
        return clone

    def set_up(self, plan: Plan, *, networked: bool = False) -> dict[str, Any]:
        """Allocate shared memory for the plan; returns the numerics profile.

        `networked`: other hosts may take part.
        """
        self._channel.send({"op": "setup", "plan": plan.to_message(), "networked": networked})
        message, fds = self._expect("ready", LOAD_SECONDS)
        self._segments = [
            Segment(fd, nbytes) for fd, nbytes in zip(fds, message["nbytes"], strict=True)
        ]
        self.layout = Layout.from_message(message["layout"])
        self.state = self._segments[0]
        self.control = Control(self._segments[2], ControlShape(**message["control"]))
        self.base = Base(self.control, self.state, self._segments[1])
        self.slots, self.slot_map = self._segments[3], SlotMap.from_message(message["slots"])
        profile: dict[str, Any] = message["profile"]
        return profile

    def spawn(self, number: int) -> Seat:
        """Fork a worker into a seat."""
        self._channel.send({"op": "spawn", "seat": number})
        message, (channel_fd, pidfd) = self._expect("spawned", END_SECONDS)
        seat = Seat(
            number=number, pid=message["pid"], channel=Channel.from_fd(channel_fd), pidfd=pidfd
        )
        if number in self.seats:
            self.seats[number].close()
        self.seats[number] = seat
        return seat

    def events(self, timeout: float) -> Iterator[Event]:
        """What the workers have said, and who has died; waits up to `timeout` seconds for it.

        A worker's last words come before its death.

        Raises:
            WorkerLostError: the nursery has died.
        """
        poll = select.poll()
        channels: dict[int, Seat] = {}
        deaths: dict[int, Seat] = {}
        for seat in self.seats.values():
            if seat.alive:
                poll.register(seat.channel, select.POLLIN)
                poll.register(seat.pidfd, select.POLLIN)
                channels[seat.channel.fileno()] = seat
                deaths[seat.pidfd] = seat
        poll.register(self._channel, select.POLLIN)
        if self.also_wake is not None:
            poll.register(self.also_wake, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(timeout * 1000)}
        for fd in ready & channels.keys():
            yield from self._heard(channels[fd])
        if self._channel.fileno() in ready:
            self._hear_nursery()
        for fd in ready & deaths.keys():
            seat = deaths[fd]
            yield from self._heard(seat)
            seat.alive = False
            yield Event(seat=seat, message=None)

    def _heard(self, seat: Seat) -> Iterator[Event]:
        try:
            while seat.channel.ready():
                message, fds = seat.channel.receive()
                if fds:
                    seat.stack_fd = fds[0]
                yield Event(seat=seat, message=message)
        except Closed:
            return

    def _hear_nursery(self) -> None:
        try:
            message, _ = self._channel.receive(0)
        except (Closed, TimeoutError):
            raise self._lost() from None
        self._note(message)

    def _note(self, message: Message) -> None:
        if message["event"] == "exited":
            self._exits[message["pid"]] = message["code"]

    def how_it_ended(self, seat: Seat) -> str:
        """Why a dead worker died, in words."""
        limit = time.monotonic() + 1.0
        while seat.pid not in self._exits and time.monotonic() < limit:
            try:
                message, _ = self._channel.receive(max(0.0, limit - time.monotonic()))
            except (Closed, TimeoutError):
                break
            self._note(message)
        code = self._exits.get(seat.pid)
        return "ended" if code is None else describe_exit(code)

    def _expect(self, event: str, seconds: float) -> tuple[Message, list[int]]:
        limit = time.monotonic() + seconds
        while True:
            try:
                message, fds = self._channel.receive(max(0.0, limit - time.monotonic()))
            except Closed:
                raise self._lost() from None
            except TimeoutError:
                raise WorkerLostError(
                    f"the nursery was silent for {seconds:.0f} s",
                    expected=f"{event!r}",
                    fix="look at what the task does when it is built",
                ) from None
            if message["event"] == event:
                return message, fds
            if message["event"] == "failed":
                raise from_message(message["error"])
            self._note(message)

    def _lost(self) -> WorkerLostError:
        code = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(END_SECONDS)
        return WorkerLostError(
            "the nursery, the parent of all workers, has ended",
            expected="a process that loads the task, and lives as long as the run",
            found="" if code is None else f"it {describe_exit(code)}",
            fix="look for os._exit or native code that crashes in what the task loads, and for "
            "the out-of-memory killer in the system's log",
        )

    def close(self) -> None:
        """End every process and let go of the shared memory."""
        self._channel.close()
        for seat in self.seats.values():
            seat.close()
        self.seats.clear()
        if self._process is not None:
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self.data is not None:
            self.data.close()
        if self._segments:
            self.base.close()
            self.control.close()
            for segment in (*self._segments[:2], self._segments[3]):
                segment.close()
            self._segments = []
