"""The counter: a Unix socket on which `up` takes requests of this machine, mode 0600.

Messages are lines of JSON. One connection is one asker: what it has opened is closed with it.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lockstep.errors import NetworkError, ProtocolError, from_message
from lockstep.net.frames import Message
from lockstep.net.sockets import closed, end
from lockstep.system.unix_socket import Lines, short_path

SOCKET = "up.sock"
MAX_CALLERS = 64
ANSWER_SECONDS = 5.0
LOOK_SECONDS = 0.5
_SECOND = struct.pack("ll", 1, 0)
"""A `struct timeval`."""
Put = Callable[[str, Message | None], None]
"""Told what a caller says; None when it is gone. Called from several threads."""


class ControlSocket:
    """Serves callers until it is closed."""

    def __init__(self, folder: Path, put: Put) -> None:
        """Listen. An older socket is replaced: the folder's lock says that nobody serves it."""
        self._put, self._path = put, folder / SOCKET
        self._callers: dict[str, Lines] = {}
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._closing = False
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with short_path(self._path) as place:
            self._listener.bind(place)
        self._path.chmod(0o600)
        self._listener.listen(8)
        self._accepting = threading.Thread(
            target=self._accept, name="lockstep counter", daemon=True
        )
        self._accepting.start()

    def tell(self, caller: str, message: Mapping[str, Any]) -> None:
        """Send a message; to one that is gone, or does not read, in vain."""
        with self._lock:
            lines = self._callers.get(caller)
        if lines is not None:
            try:
                lines.send(message)
            except OSError:
                end(lines.sock)

    def close(self) -> None:
        """Serve nobody any more. Leaves no thread and no descriptor."""
        with self._lock:
            self._closing = True
        end(self._listener)
        self._accepting.join()
        self._listener.close()
        self._path.unlink(missing_ok=True)
        with self._lock:
            for lines in self._callers.values():
                end(lines.sock)
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            number += 1
            with self._lock:
                if self._closing or len(self._callers) >= MAX_CALLERS:
                    sock.close()
                    continue
                caller = f"@{number}"
                self._callers[caller] = Lines(sock)
                thread = threading.Thread(
                    target=self._serve, args=(caller, sock), name=f"lockstep {caller}", daemon=True
                )
                self._threads.add(thread)
            thread.start()

    def _serve(self, caller: str, sock: socket.socket) -> None:
        # Reading waits for as long as the caller lives; writing does not.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SECOND)
        lines = self._callers[caller]
        with contextlib.suppress(OSError, ProtocolError):
            while (message := lines.receive()) is not None:
                self._put(caller, message)
        with self._lock:
            del self._callers[caller]
            self._threads.discard(threading.current_thread())
        sock.close()
        self._put(caller, None)


class LinesConnection:
    """A connection over a socket of this machine: a `Connection`, but for `open`."""

    def __init__(self, who: str, sock: socket.socket) -> None:
        """`who` is at the other end, for errors."""
        self._who, self._sock = who, sock
        self._lines = Lines(sock)

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send a message. Raises `PeerClosedError`."""
        try:
            self._lines.send(message)
        except OSError as error:
            raise closed(self._who, "a request", str(error)) from None

    def hear(self, seconds: float = LOOK_SECONDS) -> Message | None:
        """The next message; None if nothing has come for so long.

        Raises:
            PeerClosedError: it has ended.
        """
        try:
            self._sock.settimeout(seconds)
            message = self._lines.receive()
        except TimeoutError:
            return None
        except OSError as error:
            raise closed(self._who, "an answer", str(error)) from None
        if message is None:
            raise closed(self._who, "an answer", "it has ended")
        return message

    def interrupt(self) -> None:
        """Let whoever waits in `hear` return. May be called from any thread."""
        end(self._sock)

    def close(self) -> None:
        self._sock.close()


class ControlConnection(LinesConnection):
    """A caller's side of `up`'s counter; a `Connection`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        super().__init__("`lockstep up`", socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))

    def open(self, timeout: float) -> None:
        """Connect.

        Raises:
            PeerClosedError: no `up` runs with this folder.
        """
        self._sock.settimeout(timeout)
        try:
            with short_path(self._folder / SOCKET) as place:
                self._sock.connect(place)
        except OSError as error:
            gone = closed("`lockstep up`", f"that it runs with --state {self._folder}", str(error))
            gone.fix = "start it on this machine: lockstep up"
            raise gone from None


def ask(folder: Path, message: Mapping[str, Any]) -> Message:
    """The answer of this machine's `up` to one request.

    Raises:
        NetworkError: none runs with this folder, or it does not answer.
        LockstepError: it refuses.
    """
    connection = ControlConnection(folder)
    try:
        connection.open(ANSWER_SECONDS)
        connection.tell(message)
        answer = connection.hear(ANSWER_SECONDS)
    finally:
        connection.close()
    if answer is None:
        raise NetworkError("`lockstep up` does not answer", expected=f"within {ANSWER_SECONDS:g} s")
    if answer.get("op") == "error":
        raise from_message({"kind": "", **{k: str(v) for k, v in answer.items()}})
    return answer
