"""Unix sockets at paths of any length, and typed messages on them.

A message is preceded by its length: 4 bytes, unsigned, big-endian.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from lockstep.errors import ProtocolError
from lockstep.system.messages import Codec, Message, encode

MAX_BYTES = 1 << 20
"""Of a message."""
LENGTH = struct.Struct(">I")


class MessageSocket:
    """Messages on a stream socket."""

    def __init__(self, sock: socket.socket, codec: Codec[Message]) -> None:
        """`codec` decodes what may come."""
        self.sock, self._codec = sock, codec
        self._read = bytearray()

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            OSError: by the socket.
            ProtocolError: it is too long, or cannot be sent.
        """
        body = encode(message)
        _check_length(len(body))
        self.sock.sendall(LENGTH.pack(len(body)) + body)

    def receive(self) -> Message | None:
        """The next message; None at the end of the stream.

        Raises:
            TimeoutError: it has not come within the socket's timeout.
            ProtocolError: it is none that may come; nothing more can be received.
        """
        if not self._fill(LENGTH.size):
            return None
        (length,) = LENGTH.unpack_from(self._read)
        _check_length(length)
        if not self._fill(LENGTH.size + length):
            return None
        body = bytes(self._read[LENGTH.size : LENGTH.size + length])
        del self._read[: LENGTH.size + length]
        return self._codec.decode(body)

    def _fill(self, count: int) -> bool:
        """Have so many bytes; False at the end of the stream."""
        while len(self._read) < count:
            data = self.sock.recv(65536)
            if not data:
                return False
            self._read += data
        return True


def _check_length(length: int) -> None:
    if not 0 < length <= MAX_BYTES:
        raise ProtocolError(
            "a message has an impossible length",
            expected=f"1 to {MAX_BYTES:,} bytes",
            found=f"{length:,}",
        )


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A path of a socket that fits into a socket's address, however long the path itself is."""
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)
