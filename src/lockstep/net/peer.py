"""One connected host: its lanes, what is under way with it, and how it is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lockstep.errors import NetworkError, PeerClosedError
from lockstep.net.connections import Incoming, Lane, Outgoing
from lockstep.net.frames import Frame, Header, parse_message
from lockstep.net.pending import Inbox, Mailbox
from lockstep.net.sockets import closed, end, has_hung_up
from lockstep.net.transport import Heard


class Peer:
    """Its two lanes to the peer and the two from it come one by one, in any order.

    `changed` is called without a lock held whenever `error` has been set.
    """

    def __init__(
        self, name: str, inbox: Inbox, changed: Callable[[Peer, NetworkError], None]
    ) -> None:
        self.name = name
        self.incoming: dict[Lane, Incoming] = {}
        self.outgoing: dict[Lane, Outgoing] = {}
        self.mailbox = Mailbox(name, self._describe)
        self.error: NetworkError | None = None
        """Why nothing can be sent to it any more. Tensors may still be on their way from it."""
        self._inbox, self._changed = inbox, changed
        self._lock = threading.Lock()

    @property
    def complete(self) -> bool:
        """Whether it has, or had, all its lanes."""
        return len(self.incoming) == len(self.outgoing) == len(Lane)

    @property
    def alive(self) -> bool:
        return self.complete and self.error is None

    @property
    def has_left(self) -> bool:
        """Whether it has said goodbye."""
        lane = self.incoming.get(Lane.CONTROL)
        return lane is not None and lane.ended_well

    def place(self, header: Header) -> memoryview:
        """Where a tensor belongs that has begun to come; waits until it is expected.

        Meanwhile nobody reads on its lane. That a peer is gone is told by the lane for messages; of
        one that has never opened all lanes, the end of this one is looked for.
        """

        def check() -> None:
            if not self.complete and has_hung_up(self.incoming[Lane.DATA].sock):
                found = f"the end of the stream, and nobody has expected {header}"
                raise closed(f"host {self.name}", "a goodbye", found)

        return self.mailbox.place(header, check)

    def receive(self, lane: Lane) -> None:
        """Receive on a lane until it ends. Run by the thread that has accepted it."""
        error = self.incoming[lane].run(lambda frame: self._deliver(lane, frame))
        if lane is Lane.DATA:
            self.mailbox.fail(error)
        if self.incoming[lane].ended_well:
            # Nothing more is said on this lane, but what is on its way on the other one counts.
            if lane is Lane.CONTROL:
                self._set(error)
        else:
            self.lose(error)
        if lane is Lane.CONTROL and self.complete:
            self._inbox.put(Heard(peer=self.name, error=self.error), lambda: True)

    def sending_failed(self, error: NetworkError) -> None:
        """A lane to the peer has ended. Called by its thread.

        If the peer has closed it, the lanes from it end as well, after what is on its way there.
        """
        self._set(error)
        if not isinstance(error, PeerClosedError):
            self.lose(error)

    def lose(self, error: NetworkError) -> None:
        """Fail whatever is under way, and end all lanes. Does not wait for their threads."""
        self._set(error)
        self.mailbox.fail(error)
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

    def lane(self, lane: Lane, what: str) -> Outgoing:
        """The lane to it, if all lanes are there.

        Raises:
            NetworkError: it is lost, or not connected yet.
        """
        if self.error is not None:
            raise self.error.awaiting(what)
        if not self.complete:
            raise closed(f"host {self.name}", what, "it is not connected yet")
        return self.outgoing[lane]

    def _set(self, error: NetworkError) -> None:
        with self._lock:
            if self.error is not None:
                return
            self.error = error
        self._changed(self, error)

    def _deliver(self, lane: Lane, frame: Frame) -> None:
        if lane is Lane.DATA:
            self.mailbox.arrived(frame.header)
        else:
            heard = Heard(peer=self.name, message=parse_message(frame.body))
            self._inbox.put(heard, lambda: self.error is not None)

    def _describe(self) -> str:
        lane = self.incoming.get(Lane.DATA)
        return lane.describe() if lane else "no connection from it"
