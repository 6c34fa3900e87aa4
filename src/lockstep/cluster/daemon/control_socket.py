"""Control socket: a Unix socket on which `up` takes requests of this machine, mode 0600.

One connection is one caller: the jobs that it has opened are closed with it.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lockstep.cluster.daemon.cluster_messages import (
    FROM_LOCAL,
    FROM_UP,
    RequestFailed,
)
from lockstep.errors import NetworkError, ProtocolError
from lockstep.net.sockets import closed, end
from lockstep.system.messages import Codec, ErrorMessage, Message
from lockstep.system.unix_socket import MessageSocket, short_path

SOCKET = "up.sock"
MAX_CALLERS = 64
ANSWER_SECONDS = 5.0
LOOK_SECONDS = 0.5
RETRY_SECONDS = 0.05
_SECOND = struct.pack("ll", 1, 0)
"""A `struct timeval`."""
A = TypeVar("A", bound=Message)
Put = Callable[[str, Message | None], None]
"""Receives what a caller says; None when it is gone. Called from several threads, and may wait."""


class ControlSocket:
    """Serves callers until it is closed."""

    def __init__(self, folder: Path, put: Put) -> None:
        """Listen. An older socket is replaced: the folder's lock says that nobody serves it."""
        self._put, self._path = put, folder / SOCKET
        self._callers: dict[str, MessageSocket] = {}
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()
        self._closing = False
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with short_path(self._path) as path:
            self._listener.bind(path)
        self._path.chmod(0o600)
        self._listener.listen(8)
        self._accepting = threading.Thread(
            target=self._accept, name="lockstep control socket", daemon=True
        )
        self._accepting.start()

    def tell(self, caller: str, message: Message) -> None:
        """Send a message; to one that is gone, or does not read, in vain."""
        with self._lock:
            connection = self._callers.get(caller)
        if connection is not None:
            try:
                connection.send(message)
            except (OSError, ProtocolError):
                end(connection.sock)

    def close(self) -> None:
        """Serve nobody any more. Leaves no thread and no descriptor."""
        with self._lock:
            self._closing = True
        end(self._listener)
        self._accepting.join()
        self._listener.close()
        self._path.unlink(missing_ok=True)
        with self._lock:
            for connection in self._callers.values():
                end(connection.sock)
            threads = list(self._threads)
        for thread in threads:
            thread.join()

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                with self._lock:
                    if self._closing:
                        return
                time.sleep(RETRY_SECONDS)  # perhaps out of descriptors for a while
                continue
            number += 1
            with self._lock:
                if self._closing or len(self._callers) >= MAX_CALLERS:
                    sock.close()
                    continue
                caller = f"@{number}"
                self._callers[caller] = MessageSocket(sock, FROM_LOCAL)
                thread = threading.Thread(
                    target=self._serve, args=(caller, sock), name=f"lockstep {caller}", daemon=True
                )
                self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError:  # there are too many threads: others may end
                self._forget(caller, thread)
                sock.close()

    def _forget(self, caller: str, thread: threading.Thread) -> None:
        with self._lock:
            del self._callers[caller]
            self._threads.discard(thread)

    def _serve(self, caller: str, sock: socket.socket) -> None:
        # Reading waits for as long as the caller lives; writing does not.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SECOND)
        connection = self._callers[caller]
        try:
            while (message := connection.receive()) is not None:
                self._put(caller, message)
        except ProtocolError as error:
            self.tell(caller, RequestFailed(error=ErrorMessage.of(error)))
        except OSError:
            pass  # it is gone
        self._forget(caller, threading.current_thread())
        sock.close()
        self._put(caller, None)


class LocalConnection:
    """A connection over a socket of this machine: a `Connection`, but for `open`."""

    def __init__(self, who: str, sock: socket.socket, codec: Codec[Message]) -> None:
        """`who` is at the other end, for errors; `codec` decodes what it says."""
        self._who, self._sock = who, sock
        self._messages = MessageSocket(sock, codec)

    def tell(self, message: Message) -> None:
        """Send a message. Raises `PeerClosedError`."""
        try:
            self._messages.send(message)
        except OSError as error:
            raise closed(self._who, "a request", str(error)) from None

    def hear(self, seconds: float = LOOK_SECONDS) -> Message | None:
        """The next message; None if nothing has come for so long.

        Raises:
            PeerClosedError: it has ended.
            ProtocolError: it has sent something else.
        """
        try:
            self._sock.settimeout(seconds)
            message = self._messages.receive()
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


class ControlConnection(LocalConnection):
    """A caller's side of `up`'s control socket; a `Connection`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        super().__init__("`lockstep up`", sock, FROM_UP)

    def open(self, timeout: float) -> None:
        """Connect.

        Raises:
            PeerClosedError: no `up` runs with this folder.
        """
        self._sock.settimeout(timeout)
        try:
            with short_path(self._folder / SOCKET) as path:
                self._sock.connect(path)
        except OSError as error:
            gone = closed("`lockstep up`", f"that it runs with --state {self._folder}", str(error))
            gone.fix = "start it on this machine: lockstep up"
            raise gone from None


def ask(folder: Path, request: Message, answer: type[A]) -> A:
    """The answer of this machine's `up` to one request, which is to be of this kind.

    Raises:
        NetworkError: none runs with this folder, or it does not answer.
        LockstepError: it refuses.
    """
    connection = ControlConnection(folder)
    try:
        connection.open(ANSWER_SECONDS)
        connection.tell(request)
        found = connection.hear(ANSWER_SECONDS)
    finally:
        connection.close()
    if found is None:
        raise NetworkError("`lockstep up` does not answer", expected=f"within {ANSWER_SECONDS:g} s")
    if isinstance(found, RequestFailed):
        raise found.error.error()
    if not isinstance(found, answer):
        raise ProtocolError(
            "`lockstep up` gives another answer",
            expected=answer.__name__,
            found=type(found).__name__,
        )
    return found
