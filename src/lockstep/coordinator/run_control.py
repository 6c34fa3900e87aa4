"""Run control: requests to a running job, from signals, from Python and from a Unix socket.

Others on this machine reach it by a Unix socket in the run folder, which its owner alone may use.
A caller sends one `Request`, and gets `Taken`, or the error if it was refused.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Annotated, Any, Literal, get_args

import msgspec

from lockstep.errors import (
    JobError,
    LockstepError,
    ProtocolError,
    RunFolderError,
    RunInterrupted,
    StoppedError,
)
from lockstep.system.messages import Codec, ErrorMessage, Message
from lockstep.system.unix_socket import MessageSocket, short_path

SOCKET = "control.sock"
ANSWER_SECONDS = 5.0
CALLER_SECONDS = 0.2
"""How long a caller may hold up the coordinator."""

RequestName = Literal["scale", "pause", "go_on", "checkpoint", "stop"]


class Request(Message, tag="request"):
    """What somebody wants of the run."""

    name: RequestName
    number: Annotated[int, msgspec.Meta(ge=-(1 << 40), le=1 << 40)] = 0
    """The workers wanted, for `scale`."""


class Taken(Message, tag="taken"):
    """The coordinator has taken a request."""

    max_workers: int | None
    """The most workers that the run can have."""


REQUESTS: Codec[Message] = Codec(Request)
ANSWERS: Codec[Message] = Codec(Taken | ErrorMessage)


class RunControl:
    """Collects requests until the coordinator takes them. Use it as a context manager."""

    def __init__(self, opened: Callable[[Path], None] | None = None) -> None:
        """`opened` is called with the run folder, once requests are taken there."""
        self._opened = opened
        self._waiting: deque[Request] = deque()
        self._listener: socket.socket | None = None
        self._path: Path | None = None
        self._handlers: dict[int, Any] = {}
        self._max_workers: int | None = None
        self._signal_came = False

    def __enter__(self) -> RunControl:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()
        if self._listener is not None and self._path is not None:
            self._listener.close()
            self._path.unlink(missing_ok=True)

    def add(self, name: str, number: int = 0) -> None:
        """Leave a request. May be called from any thread.

        Raises:
            JobError: there is no such request, or it is for more workers than the run can have.
        """
        request = Request(name=checked(name), number=number)
        if request.name == "scale":
            self._check_workers(number)
        self._waiting.append(request)

    def _check_workers(self, number: int) -> None:
        most = self._max_workers
        if number >= 1 and (most is None or number <= most):
            return
        raise JobError(
            f"the run cannot have {number} workers; their number stays as it is",
            expected="at least 1" if most is None else f"1 to {most}, its max_workers",
            found=str(number),
            fix="lockstep stop ends the run with a checkpoint"
            if number < 1
            else "start runs with --max-workers N (and --shards N) to scale them up to N",
        )

    def take(self) -> list[Request]:
        """The requests since the last call. Called by the coordinator, about every tick."""
        self._answer_callers()
        taken = []
        while self._waiting:
            taken.append(self._waiting.popleft())
        return taken

    def take_signals(self) -> None:
        """Let SIGINT, SIGTERM and SIGHUP ask for a stop at a step's end, and a second one end it
        at once. A SIGHUP that is ignored, as under nohup, stays ignored.

        Signals can only be taken in the main thread; in any other this does nothing.
        """
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._handlers[number] = signal.signal(number, self._signalled)

    def _signalled(self, number: int, _: FrameType | None) -> None:
        for other in self._handlers:
            signal.signal(other, signal.default_int_handler)
        self._signal_came = True
        self.add("stop")

    def stopped(self, error: StoppedError) -> StoppedError | RunInterrupted:
        """What the caller is to get of a stop: if a signal asked for it, an interruption."""
        return RunInterrupted(error) if self._signal_came else error

    def open(self, folder: Path, max_workers: int) -> None:
        """Listen in a run folder. From now on `scale` is refused beyond `max_workers`."""
        self._max_workers = max_workers
        self._path = folder / SOCKET
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with short_path(folder / SOCKET) as place:
            self._listener.bind(place)
        self._path.chmod(0o600)
        self._listener.listen(8)
        if self._opened is not None:
            self._opened(folder)

    def _answer_callers(self) -> None:
        while self._listener is not None:
            try:
                caller, _ = self._listener.accept()
            except OSError:  # nobody calls, or there is no descriptor for it: at the next tick
                return
            with caller, contextlib.suppress(OSError):
                caller.settimeout(CALLER_SECONDS)
                messages = MessageSocket(caller, REQUESTS)
                messages.send(self._answer(messages))

    def _answer(self, messages: MessageSocket) -> Taken | ErrorMessage:
        try:
            request = messages.receive()
            if not isinstance(request, Request):
                raise ProtocolError("a caller asked for nothing")
            self.add(request.name, request.number)
            return Taken(max_workers=self._max_workers)
        except LockstepError as error:
            return ErrorMessage.of(error)


def ask(folder: Path, name: str, number: int = 0) -> Taken:
    """Ask something of the run in a folder. Returns its answer.

    Raises:
        JobError: the run refuses the request.
        RunFolderError: nothing runs there.
    """
    request = Request(name=checked(name), number=number)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.settimeout(ANSWER_SECONDS)
        try:
            with short_path(folder / SOCKET) as place:
                caller.connect(place)
            messages = MessageSocket(caller, ANSWERS)
            messages.send(request)
            answer = messages.receive()
        except OSError as error:
            raise RunFolderError(
                f"nothing runs in {folder}", found=str(error), fix="look at its events.jsonl"
            ) from None
    if isinstance(answer, ErrorMessage):
        raise answer.error()
    if not isinstance(answer, Taken):
        raise RunFolderError(
            f"the run in {folder} ended before it answered", fix="look at its events.jsonl"
        )
    return answer


def checked(name: str) -> RequestName:
    """The name of a request.

    Raises:
        JobError: there is none of this name.
    """
    for known in get_args(RequestName):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise JobError(f"unknown request {name!r}", expected=" or ".join(get_args(RequestName)))
