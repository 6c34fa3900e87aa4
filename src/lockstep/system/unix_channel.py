"""Small JSON messages, with file descriptors when needed, between processes of one host.

A `SOCK_SEQPACKET` socket pair keeps message boundaries. Larger messages travel in a memfd, so a
message has no length limit and the socket's buffer never fills. Nothing is unpickled.
"""

from __future__ import annotations

import array
import json
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

INLINE = 32 << 10
"""Bytes: longer messages go by memfd."""
MAX_FDS = 8

Message = dict[str, Any]


class Closed(Exception):
    """The other end is gone."""


class Channel:
    """One end of a pair. Not for several threads at once."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    @staticmethod
    def pair() -> tuple[Channel, Channel]:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return Channel(left), Channel(right)

    @staticmethod
    def from_fd(fd: int) -> Channel:
        return Channel(socket.socket(fileno=fd))

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message; the descriptors are duplicated into the receiver.

        Raises:
            Closed: nobody is at the other end.
        """
        body = json.dumps(message).encode()
        spilled = -1
        try:
            if len(body) > INLINE:
                spilled = os.memfd_create("lockstep-message", os.MFD_CLOEXEC)
                with open(spilled, "wb", closefd=False) as file:
                    file.write(body)
                body, fds = b"", [spilled, *fds]
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            self.sock.sendmsg([b"." + body], ancillary if fds else [])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error
        finally:
            if spilled >= 0:
                os.close(spilled)

    def receive(self, timeout: float | None = None) -> tuple[Message, list[int]]:
        """The next message and its descriptors, which are now the caller's to close.

        Raises:
            Closed: the other end is gone.
            TimeoutError: nothing came within `timeout` seconds.
        """
        if not self.ready(timeout):
            raise TimeoutError
        try:
            data, ancillary, _, _ = self.sock.recvmsg(
                INLINE + 64, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError as error:
            raise Closed from error
        if not data:
            raise Closed
        fds = array.array("i")
        for _, _, block in ancillary:
            fds.frombytes(block[: len(block) - len(block) % fds.itemsize])
        got, body = list(fds), data[1:]
        if not body:
            with open(got.pop(0), "rb") as file:
                file.seek(0)
                body = file.read()
        message: Message = json.loads(body)
        return message, got

    def ready(self, timeout: float | None = 0.0) -> bool:
        """Whether `receive` would return (or raise `Closed`) within `timeout` seconds."""
        limit = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        left = None if limit is None else max(0.0, limit - time.monotonic())
        return bool(poll.poll(None if left is None else left * 1000))

    def close(self) -> None:
        self.sock.close()
