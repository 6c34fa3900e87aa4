"""Unix channel: messages, and file descriptors with them, between processes of one host.

A `SOCK_SEQPACKET` socket pair keeps message boundaries. Longer messages travel in a memfd, so a
message has no length limit and the socket's buffer never fills. Nothing is unpickled.
"""

from __future__ import annotations

import array
import os
import select
import socket
import time
from collections.abc import Sequence
from typing import Generic, TypeVar

from lockstep.system.messages import Codec

INLINE = 32 << 10
"""Bytes: longer messages go by memfd."""
MAX_FDS = 253
"""In one message: the kernel takes no more."""
_INLINE, _SPILLED = b".", b"@"
"""The first byte of a packet: whether the message follows it, or lies in the first descriptor."""


class Closed(Exception):
    """The other end is gone."""


class Channel:
    """One end of a pair, for bytes. Not for several threads at once."""

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

    def send(self, body: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message; the descriptors are duplicated into the receiver.

        Raises:
            Closed: nobody is at the other end.
        """
        packet, spilled = _INLINE + body, -1
        try:
            if len(body) > INLINE:
                spilled = os.memfd_create("lockstep-message", os.MFD_CLOEXEC)
                with open(spilled, "wb", closefd=False) as file:
                    file.write(body)
                packet, fds = _SPILLED, [spilled, *fds]
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            self.sock.sendmsg([packet], ancillary if fds else [])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error
        finally:
            if spilled >= 0:
                os.close(spilled)

    def receive(self, timeout: float | None = None) -> tuple[bytes, list[int]]:
        """The next message and its descriptors, which are now the caller's to close.

        Raises:
            Closed: the other end is gone.
            TimeoutError: nothing came within `timeout` seconds.
        """
        if not self.ready(timeout):
            raise TimeoutError
        try:
            packet, ancillary, _, _ = self.sock.recvmsg(
                INLINE + 64, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError as error:
            raise Closed from error
        if not packet:
            raise Closed
        received = array.array("i")
        for _, _, block in ancillary:
            received.frombytes(block[: len(block) - len(block) % received.itemsize])
        fds, body = list(received), packet[1:]
        if packet[:1] == _SPILLED:
            with open(fds.pop(0), "rb") as file:
                file.seek(0)
                body = file.read()
        return body, fds

    def ready(self, timeout: float | None = 0.0) -> bool:
        """Whether `receive` would return (or raise `Closed`) within `timeout` seconds."""
        limit = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        left = None if limit is None else max(0.0, limit - time.monotonic())
        return bool(poll.poll(None if left is None else left * 1000))

    def close(self) -> None:
        self.sock.close()


Outgoing = TypeVar("Outgoing")
Incoming = TypeVar("Incoming")


class MessageChannel(Generic[Outgoing, Incoming]):
    """One end of a conversation: a channel, and what may be said in each direction."""

    def __init__(
        self, channel: Channel, outgoing: Codec[Outgoing], incoming: Codec[Incoming]
    ) -> None:
        self.channel = channel
        self._outgoing, self._incoming = outgoing, incoming

    def fileno(self) -> int:
        return self.channel.fileno()

    def send(self, message: Outgoing, fds: Sequence[int] = ()) -> None:
        """Send a message; raises as `Channel.send` does."""
        self.channel.send(self._outgoing.encode(message), fds)

    def receive(self, timeout: float | None = None) -> tuple[Incoming, list[int]]:
        """The next message and its descriptors; raises as `Channel.receive` does.

        Raises:
            ProtocolError: it is not one of the messages that may come here.
        """
        body, fds = self.channel.receive(timeout)
        return self._incoming.decode(body), fds

    def ready(self, timeout: float | None = 0.0) -> bool:
        """Whether `receive` would return, or raise `Closed`, within `timeout` seconds."""
        return self.channel.ready(timeout)

    def close(self) -> None:
        self.channel.close()
