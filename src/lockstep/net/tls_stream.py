"""A socket under TLS that moves much at once.

Python's `SSLSocket` makes two system calls and one call from Python for each record of 16 KiB. Here
OpenSSL works on memory, and the kernel is asked for many records at a time: measured on loopback,
both ways at once, that is about twice as fast.
"""

from __future__ import annotations

import socket
import ssl
import time
from typing import Any

CHUNK = 256 << 10
"""Bytes that are encrypted and sent at once, and for which the kernel is asked at once."""


class Deadline:
    """A moment that several waits share."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, more than 0.

        Raises:
            TimeoutError: there are none.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    @property
    def rest(self) -> float:
        """Seconds; 0 if there are none."""
        return max(0.0, self._end - time.monotonic())

    @property
    def over(self) -> bool:
        return not self.rest


class TlsStream(socket.socket):
    """A connected socket whose bytes go through TLS. For one thread at a time.

    Only what is overridden here goes through TLS. The end of the stream reads as 0 bytes, whether
    or not the peer has announced it: frames tell whether it was in order.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server: bool) -> None:
        """`sock` is of no use from then on. The handshake is still to be done."""
        timeout = sock.gettimeout()
        super().__init__(sock.family, sock.type, sock.proto, fileno=sock.detach())
        self.settimeout(timeout)
        self._coming, self._going = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._coming, self._going, server_side=server)
        self._room = bytearray(CHUNK)
        self.deadline: Deadline | None = None
        """By when whatever is under way has to be done. Unlike a socket's timeout, a byte that
        comes does not renew it."""

    def do_handshake(self) -> None:
        """Do TLS's handshake. Raises what sockets raise."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                if not self._fetch():
                    raise ConnectionError("the end of the stream in the handshake") from None
            except ssl.SSLError:
                self._flush()  # the alert that says why
                raise
            else:
                self._flush()
                return

    def getpeercert(self) -> Any:
        """The peer's certificate, as `SSLSocket.getpeercert` gives it."""
        return self._tls.getpeercert()

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Encrypt and send all of it."""
        view = memoryview(data)
        for start in range(0, len(view), CHUNK):
            self._tls.write(view[start : start + CHUNK])
            self._flush()

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Receive what is there, at least a byte, into `buffer`; 0 at the stream's end."""
        view, count = memoryview(buffer), 0
        while count < len(view):
            try:
                got = self._tls.read(len(view) - count, view[count:])
            except ssl.SSLWantReadError:
                if count or not self._fetch():
                    break
                continue
            except ssl.SSLZeroReturnError:
                break
            if not got:
                break
            count += int(got)
        return count

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """Receive at most so many bytes; none at the stream's end."""
        room = bytearray(bufsize)
        return bytes(room[: self.recv_into(room)])

    def send(self, data: Any, flags: int = 0) -> int:
        """Send all of it, as `sendall`: nothing may go past TLS."""
        self.sendall(data)
        return len(memoryview(data))

    def _flush(self) -> None:
        if self._going.pending:
            self._limit()
            super().sendall(self._going.read())

    def _fetch(self) -> bool:
        """Get more bytes from the kernel; False at the stream's end."""
        self._limit()
        count = super().recv_into(self._room)
        if count:
            self._coming.write(memoryview(self._room)[:count])
        return bool(count)

    def _limit(self) -> None:
        """Let the next call of the kernel end at the deadline. Raises TimeoutError."""
        if self.deadline is not None:
            self.settimeout(self.deadline.left())
