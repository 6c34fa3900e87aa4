"""Unix sockets at paths of any length, and JSON lines on them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lockstep.errors import ProtocolError

MAX_LINE = 1 << 20


class Lines:
    """Messages on a stream socket, each a line."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._read = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message. Raises OSError."""
        self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message; None at the end of the stream.

        Raises:
            TimeoutError: it has not come within the socket's timeout.
            ProtocolError: it is no message.
        """
        while b"\n" not in self._read:
            if len(self._read) > MAX_LINE:
                raise ProtocolError("a line is too long", expected=f"{MAX_LINE} bytes at most")
            data = self.sock.recv(65536)
            if not data:
                return None
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise ProtocolError("a line is no message", expected="an object in JSON")
        return message


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A path of a socket that fits into a socket's address, however long the path itself is."""
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)
