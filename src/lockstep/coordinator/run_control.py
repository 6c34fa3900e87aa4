"""Run control: requests to a running job, from signals, from Python and from a Unix socket.

Others on this machine reach it by a Unix socket in the run folder, which its owner alone may use.
A request is one line of JSON, `{"request": "scale", "number": 3}`; the answer is another, with the
error if it was refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from lockstep.errors import (
    JobError,
    RunFolderError,
    RunInterrupted,
    StoppedError,
    from_message,
    to_message,
)

REQUESTS = ("scale", "pause", "go_on", "checkpoint", "stop")
SOCKET = "control.sock"
LINE_BYTES = 4096
ANSWER_SECONDS = 5.0

Request = tuple[str, int]
"""A name from `REQUESTS`, and a number: the workers wanted, for `scale`."""


class RunControl:
    """Collects requests until the coordinator takes them. Use it as a context manager."""

    def __init__(self) -> None:
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
        if name not in REQUESTS:
            raise JobError(f"unknown request {name!r}", expected=" or ".join(REQUESTS))
        if name == "scale":
            self._check_workers(number)
        self._waiting.append((name, number))

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
        with _short_path(folder) as place:
            self._listener.bind(place)
        self._path.chmod(0o600)
        self._listener.listen(8)

    def _answer_callers(self) -> None:
        while self._listener is not None:
            try:
                caller, _ = self._listener.accept()
            except BlockingIOError:
                return
            with caller:
                caller.settimeout(0.2)
                with contextlib.suppress(OSError):
                    caller.sendall(self._answer(caller.recv(LINE_BYTES)))

    def _answer(self, line: bytes) -> bytes:
        try:
            message = json.loads(line)
            self.add(str(message["request"]), int(message.get("number", 0)))
            answer: dict[str, Any] = {"taken": True, "max_workers": self._max_workers}
        except JobError as error:
            answer = {"taken": False, "why": str(error), "error": to_message(error)}
        except (ValueError, KeyError, TypeError, AttributeError):
            answer = {"taken": False, "why": "not a request"}
        return json.dumps(answer).encode() + b"\n"


@contextlib.contextmanager
def _short_path(folder: Path) -> Iterator[str]:
    """A path for the socket of a folder, however long the folder's own path is."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}/{SOCKET}"
    finally:
        os.close(fd)


def ask(folder: Path, name: str, number: int = 0) -> dict[str, Any]:
    """Ask something of the run in a folder. Returns its answer.

    Raises:
        JobError: the run refuses the request.
        RunFolderError: nothing runs there, or it did not understand the request.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.settimeout(ANSWER_SECONDS)
        try:
            with _short_path(folder) as place:
                caller.connect(place)
            caller.sendall(json.dumps({"request": name, "number": number}).encode() + b"\n")
            answer: dict[str, Any] = json.loads(caller.recv(LINE_BYTES) or b"{}")
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"nothing runs in {folder}", found=str(error), fix="look at its events.jsonl"
            ) from None
    if "error" in answer:
        raise from_message(answer["error"])
    if not answer.get("taken"):
        raise RunFolderError(f"the run in {folder} did not take the request: {answer.get('why')}")
    return answer
