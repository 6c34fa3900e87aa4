"""Peer: one connected host, what is under way with it, and how it is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lockstep.errors import NetworkError, PeerClosedError, ProtocolError
from lockstep.net.connections import Incoming, Outgoing, Stream
from lockstep.net.frames import Frame, Header
from lockstep.net.pending import ExpectedTensors, Inbox
from lockstep.net.sockets import closed, end, has_hung_up
from lockstep.net.transport import Heard
from lockstep.system.messages import Codec, Message


class Peer:
    """Its two connections to the peer and the two from it come one by one, in any order.

    `changed` is called without a lock held whenever `error` has been set.
    """

    def __init__(
        self,
        name: str,
        inbox: Inbox,
        codec: Codec[Message] | None,
        changed: Callable[[Peer, NetworkError], None],
    ) -> None:
        """`codec`: the messages that it may send; None: none."""
        self.name = name
        self.incoming: dict[Stream, Incoming] = {}
        self.outgoing: dict[Stream, Outgoing] = {}
        self.serials: set[str] = set()
        """Of the certificates that its connections are by."""
        self.expected = ExpectedTensors(name, self._describe)
        self.error: NetworkError | None = None
        """Why nothing can be sent to it any more. Tensors may still be on their way from it."""
        self._inbox, self._codec, self._changed = inbox, codec, changed
        self._lock = threading.Lock()

    @property
    def complete(self) -> bool:
        """Whether it has, or had, all its connections."""
        return len(self.incoming) == len(self.outgoing) == len(Stream)

    @property
    def alive(self) -> bool:
        return self.complete and self.error is None

    @property
    def has_left(self) -> bool:
        """Whether it has said goodbye."""
        control = self.incoming.get(Stream.CONTROL)
        return control is not None and control.ended_well

    def await_target(self, header: Header) -> memoryview:
        """Where a tensor belongs that has begun to come; waits until it is expected.

        Meanwhile nobody reads this connection. That a peer is gone is told by the one for messages;
        of one that has never opened both, the end of this one is looked for.
        """

        def check() -> None:
            if not self.complete and has_hung_up(self.incoming[Stream.DATA].sock):
                found = f"the end of the stream, and nobody has expected {header}"
                raise closed(f"host {self.name}", "a goodbye", found)

        return self.expected.await_target(header, check)

    def receive(self, stream: Stream) -> None:
        """Receive a stream until it ends. Run by the thread that has accepted the connection."""
        error = self.incoming[stream].run(lambda frame: self._deliver(stream, frame))
        if stream is Stream.DATA:
            self.expected.fail(error)
        if self.incoming[stream].ended_well:
            # Nothing more is said here, but what is on its way on the other connection counts.
            if stream is Stream.CONTROL:
                self._set(error)
        else:
            self.lose(error)
        if stream is Stream.CONTROL and self.complete:
            self._inbox.put(Heard(peer=self.name, error=self.error), lambda: True)

    def sending_failed(self, error: NetworkError) -> None:
        """A connection to the peer has ended. Called by its thread.

        If the peer has closed it, those from it end as well, after what is on its way there.
        """
        self._set(error)
        if not isinstance(error, PeerClosedError):
            self.lose(error)

    def lose(self, error: NetworkError) -> None:
        """Fail whatever is under way, and end all connections. Does not wait for their threads."""
        self._set(error)
        self.expected.fail(error)
        for outgoing in list(self.outgoing.values()):
            outgoing.fail(error)
        for incoming in list(self.incoming.values()):
            end(incoming.sock)
        self._inbox.wake()

    def reap(self) -> None:
        """Wait for the threads and close the connections. To be called after `lose`."""
        for outgoing in self.outgoing.values():
            outgoing.join()
        for incoming in self.incoming.values():
            incoming.join()

    def sender(self, stream: Stream, what: str) -> Outgoing:
        """The connection to it for a stream, if all connections are there.

        Raises:
            NetworkError: it is lost, or not connected yet.
        """
        if self.error is not None:
            raise self.error.awaiting(what)
        if not self.complete:
            raise closed(f"host {self.name}", what, "it is not connected yet")
        return self.outgoing[stream]

    def _set(self, error: NetworkError) -> None:
        with self._lock:
            if self.error is not None:
                return
            self.error = error
        self._changed(self, error)

    def _deliver(self, stream: Stream, frame: Frame) -> None:
        """Hand a frame on. A message that cannot be decoded raises `ProtocolError`: the peer is
        lost by it, as by any other end of the stream."""
        if stream is Stream.DATA:
            self.expected.arrived(frame.header)
            return
        if self._codec is None:
            raise ProtocolError(f"host {self.name} sends a message", expected="tensors alone")
        message = self._codec.decode(frame.body)
        heard = Heard(peer=self.name, message=message, nbytes=len(frame.body))
        self._inbox.put(heard, lambda: self.error is not None)

    def _describe(self) -> str:
        data = self.incoming.get(Stream.DATA)
        return data.describe() if data else "no connection from it"
