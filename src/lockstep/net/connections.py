"""Connections: one direction, one thread each.

A host sends on connections that it has opened and receives on those that it has accepted: no TLS
object is ever used by two threads, a slow receiver holds up nothing that goes the other way, and
several connections are encrypted on several cores. Tensors and messages are streams of their own,
so that a message is not stuck behind tensors that nobody expects yet.
"""

from __future__ import annotations

import enum
import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from lockstep.errors import NetworkError, PeerTimeoutError
from lockstep.net.frames import TENSORS, Frame, Kind, Reader, Target, message_frame
from lockstep.net.pending import PendingTransfer, Recency
from lockstep.net.sockets import SILENCE_SECONDS, closed, end, peer_errors

SMALL = 8 << 10
"""Bytes: a body up to this size is copied, to be sent at once with its header."""
MAX_QUEUED = 4096
"""Frames that wait to be sent to one peer on one stream."""


class Stream(enum.StrEnum):
    """What a connection carries."""

    DATA = "data"
    CONTROL = "control"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A frame to be sent: its first bytes, then memory that is sent from where it is."""

    head: bytes
    body: memoryview | None = None
    transfer: PendingTransfer | None = None


class Outgoing:
    """Sends frames in the order in which they were given. `lost` is told of an error, once."""

    def __init__(self, sock: socket.socket, peer: str, lost: Callable[[NetworkError], None]):
        self._sock, self._peer, self._lost = sock, peer, lost
        self._items: queue.Queue[Item | None] = queue.Queue(MAX_QUEUED)
        self._lock = threading.Lock()
        self._error: NetworkError | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"lockstep-net to {peer}", daemon=True
        )
        self._thread.start()

    def send(self, item: Item) -> None:
        """Queue a frame.

        Raises:
            PeerTimeoutError: too many wait already; the peer has not read for long.
            NetworkError: the connection has failed, with its error.
        """
        with self._lock:  # so that nothing is queued behind the end
            if self._error is not None:
                raise self._error.awaiting(
                    item.transfer.what if item.transfer else "a message to it"
                )
            try:
                self._items.put_nowait(item)
            except queue.Full:
                raise PeerTimeoutError(
                    f"host {self._peer} does not read what it is sent",
                    expected=f"at most {MAX_QUEUED} frames that wait",
                    found="one more",
                ) from None

    def fail(self, error: NetworkError) -> None:
        """Send no more; whatever is queued fails. Returns before the thread has ended."""
        with self._lock:
            self._error = self._error or error
        end(self._sock)
        self._drain()

    def finish(self, timeout: float) -> None:
        """Say goodbye when all is sent, if that can be done in so many seconds."""
        try:
            self.send(Item(head=message_frame(Kind.GOODBYE)))
            self._items.put_nowait(None)
        except (NetworkError, queue.Full):
            return
        self._thread.join(timeout)

    def join(self) -> None:
        """Wait for the thread's end, after `fail`, and close the connection."""
        self._thread.join()
        self._sock.close()

    def _run(self) -> None:
        item: Item | None = None
        try:
            with peer_errors(
                f"host {self._peer}", "that it reads what it is sent", SILENCE_SECONDS
            ):
                while (item := self._items.get()) is not None:
                    if item.body is None or len(item.body) > SMALL:
                        self._sock.sendall(item.head)
                    if item.body is not None:
                        small = len(item.body) <= SMALL
                        self._sock.sendall(item.head + item.body if small else item.body)
                    if item.transfer is not None:
                        item.transfer.finish()
        except Exception as cause:  # whatever it is, this peer is lost by it, and no other
            error = (
                cause
                if isinstance(cause, NetworkError)
                else closed(f"host {self._peer}", "what it is sent", f"no sending: {cause!r}")
            )
            with self._lock:
                self._error = self._error or error
            if item is not None and item.transfer is not None:
                item.transfer.fail(self._error)
            self._drain()
            self._lost(error)

    def _drain(self) -> None:
        """Fail what is queued, and let the thread end."""
        assert self._error is not None
        while True:
            try:
                item = self._items.get_nowait()
            except queue.Empty:
                break
            if item is not None and item.transfer is not None:
                item.transfer.fail(self._error)
        self._items.put(None)


class Incoming:
    """Receives frames until the connection ends. Made and run by the thread that accepted it."""

    def __init__(
        self, sock: socket.socket, peer: str, stream: Stream, target: Target | None
    ) -> None:
        self.sock, self._peer = sock, peer
        kinds = TENSORS if stream is Stream.DATA else frozenset({Kind.CONTROL})
        self._reader = Reader(kinds | {Kind.GOODBYE}, target)
        self._recency = Recency()
        self.ended_well = False
        """Whether the peer has said goodbye on this stream."""
        self.thread = threading.current_thread()

    def run(self, deliver: Callable[[Frame], None]) -> NetworkError:
        """Give every frame to `deliver`; returns the error that says why there are no more."""
        who, reader, recency = f"host {self._peer}", self._reader, self._recency
        try:
            with peer_errors(who, "more frames", SILENCE_SECONDS):
                self.sock.settimeout(None)
                while count := self.sock.recv_into(reader.room()):
                    recency.touch()
                    frame = reader.took(count)
                    if frame is None:
                        continue
                    if frame.header.kind is Kind.GOODBYE:
                        self.ended_well = True
                        return closed(who, "more frames", "a goodbye")
                    deliver(frame)
        except NetworkError as error:
            return error
        except Exception as error:  # such as no memory: then this peer is lost, and no other
            return closed(who, "more frames", f"this host cannot receive them: {error!r}")
        cut = "between two frames" if reader.between else f"after {reader.describe()}"
        return closed(who, "a goodbye", f"the end of the stream {cut}")

    def describe(self) -> str:
        """What it is at, in words."""
        return f"{self._reader.describe()} from host {self._peer}; {self._recency}"

    def join(self) -> None:
        """Wait for the thread's end, after `end` or `fail`, and close the connection."""
        if self.thread is not threading.current_thread():
            self.thread.join()
        self.sock.close()
