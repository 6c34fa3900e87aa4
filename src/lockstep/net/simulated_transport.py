"""Simulated transport: within one process, with a scripted clock and scripted faults, for tests.

No second passes unless everybody waits, and none is really waited for. A run of one thread, or of
threads that touch each other only through this network, is the same every time.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lockstep.errors import NetworkError, ProtocolError
from lockstep.net.frames import (
    HEADER,
    TENSORS,
    Kind,
    Reader,
    head,
    message_frame,
    parse_head,
)
from lockstep.net.handshake import Facts, Hello, check_hello
from lockstep.net.pending import (
    ExpectedTensors,
    PendingTransfer,
    Wait,
    as_bytes,
    sending,
    timed_out,
)
from lockstep.net.sockets import closed
from lockstep.net.transport import Heard, Key
from lockstep.system.messages import Codec, Message

LATENCY = 0.001
"""Scripted seconds from one host to another."""
GOODBYE_SECONDS = 1.0
"""Scripted seconds for which `close` waits for what is under way."""
STUCK_SECONDS = 60.0
"""Real seconds after which a thread that does not come to wait is given up on."""


@dataclass(frozen=True, kw_only=True)
class NetworkFault:
    """What happens to the tensor number `frame`, from 1, that `source` sends to `target`."""

    source: str
    target: str
    frame: int
    kind: Literal["delay", "cut", "drop", "stall", "close"]
    """delay: it comes `seconds` later, and so does what follows it. cut: `keep` of its bytes come,
    28 of the header first, and then the connection is gone. drop: from it on nothing comes, and
    nobody is told. stall: the same in both directions. close: the source says goodbye instead."""
    seconds: float = 0.0
    keep: int = 0


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    head: bytes
    body: memoryview
    transfer: PendingTransfer


class _Way:
    """From one host to another: what is on it, and what the receiver makes of it."""

    def __init__(self, source: str, target: str, wait: Wait) -> None:
        self.source, self.target = source, target
        self.expected = ExpectedTensors(source, self._describe, wait)
        self.sent, self.last_arrival = 0, 0.0
        self.silent = False
        """Whether nothing that is sent from now on will come."""
        self.error: NetworkError | None = None
        """Why the receiver takes the source for lost."""
        self.come: deque[_Tensor | NetworkError] = deque()
        """What has come and is not expected yet; an error is the end."""
        self.under_way: list[PendingTransfer] = []
        self._reader = Reader(TENSORS, self.expected.await_target)

    def deliver(self) -> None:
        """Put what is expected into place, in order.

        Raises:
            ProtocolError: it is not what was expected.
        """
        while self.come:
            first = self.come[0]
            if isinstance(first, NetworkError):
                self.expected.fail(first)
                return
            if self.expected.find(parse_head(first.head)) is None:
                return
            for part in (first.head, first.body):
                for frame in self._reader.feed(part):
                    self.expected.arrived(frame.header)
            first.transfer.finish()
            self.come.popleft()

    def cut(self, tensor: _Tensor, keep: int) -> str:
        """Let the first bytes of a tensor come; says how far that went."""
        expected = self.expected.find(parse_head(tensor.head)) is not None
        come = (tensor.head + bytes(tensor.body))[:keep]
        for part in (come,) if expected else (come[: len(tensor.head) - 1],):
            for _ in self._reader.feed(part):
                pass
        return self._reader.describe()

    def _describe(self) -> str:
        first = self.come[0] if self.come else None
        if isinstance(first, _Tensor):
            return f"{parse_head(first.head)}, which is not expected, came first"
        return self._reader.describe()


@dataclass(frozen=True, kw_only=True)
class _Waiter:
    ready: Callable[[], bool]
    limit: float


@dataclass(kw_only=True)
class Network:
    """The hosts of a test, and what lies between them."""

    faults: Sequence[NetworkFault] = ()
    parties: int = 1
    """How many threads use it: time passes when all of them wait."""
    now: float = 0.0
    """Scripted seconds."""
    fired: list[NetworkFault] = field(default_factory=list)
    """The faults that have happened."""
    hosts: dict[str, MemoryTransport] = field(default_factory=dict)
    lock: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self._ways: dict[tuple[str, str], _Way] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._waiters: list[_Waiter] = []

    def join(
        self,
        node: str,
        *,
        job: str = "job",
        facts: Facts | None = None,
        codec: Codec[Message] | None = None,
    ) -> MemoryTransport:
        """Add a host and connect it with all others.

        Raises:
            RefusedError: it differs from one of them.
        """
        with self.lock:
            hello = Hello(job=job, node=node, facts=dict(facts or {}))
            for name, other in self.hosts.items():
                check_hello(other.hello, hello, node)
                self._ways[node, name] = _Way(node, name, self.wait_for)
                self._ways[name, node] = _Way(name, node, self.wait_for)
            self.hosts[node] = MemoryTransport(self, hello, codec)
            return self.hosts[node]

    def kill(self, node: str) -> None:
        """Let a host die, as by `kill -9`: what is on its way from it is lost."""
        with self.lock:
            for peer in self.peers(node):
                self.part(node, peer, "the end of the stream between two frames")

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Do something when the clock shows `when`."""
        with self.lock:
            heapq.heappush(self._events, (when, next(self._order), action))

    def wait(self, ready: Callable[[], bool], seconds: float) -> bool:
        """Let time pass until `ready()`, but no more than so many seconds; returns whether it is.

        Raises:
            NetworkError: other threads than those that wait are needed, and do not come.
        """
        with self.lock:
            waiter = _Waiter(ready=ready, limit=self.now + seconds)
            self._waiters.append(waiter)
            try:
                while not ready() and self.now < waiter.limit:
                    if len(self._waiters) >= self.parties and not self._somebody_goes_on():
                        self._advance()
                    elif not self.lock.wait(STUCK_SECONDS):
                        raise NetworkError(
                            "the scripted clock stands still",
                            expected=f"that {self.parties} threads wait for the network",
                            found=f"{len(self._waiters)} of them for {STUCK_SECONDS:g} s",
                        )
                return ready()
            finally:
                self._waiters.remove(waiter)

    def wait_for(self, ended: threading.Event, seconds: float) -> bool:
        """As `wait`, in the form in which a `PendingTransfer` wants it."""
        return self.wait(ended.is_set, seconds)

    # What hosts do. The lock is held.

    def peers(self, node: str) -> list[str]:
        """All that `node` is or was connected with, itself not."""
        return [target for source, target in self._ways if source == node]

    def way(self, source: str, target: str, *, node: str, what: str) -> _Way:
        """The way from one host to another, asked for by `node`, which is one of the two.

        Raises:
            PeerClosedError: they are not connected.
        """
        if (source, target) not in self._ways:
            raise closed(f"host {target if node == source else source}", what, "no connection")
        return self._ways[source, target]

    def send(self, way: _Way, tensor: _Tensor) -> None:
        """Send a tensor, and let happen to it what is scripted."""
        way.sent += 1
        way.under_way = [each for each in way.under_way if not each.ended] + [tensor.transfer]
        for fault in self.faults:
            if (fault.source, fault.target, fault.frame) == (way.source, way.target, way.sent):
                self.fired.append(fault)
                self._strike(fault, way, tensor)
        if not way.silent:
            self.at(self._arrival(way), lambda: self._arrive(way, tensor))

    def tell(self, way: _Way, body: bytes) -> None:
        """Send a message."""
        if not way.silent:
            self.at(self.now + LATENCY, lambda: self._hear(way, body))

    def _hear(self, way: _Way, body: bytes) -> None:
        """Let a message be heard; who sends what is not understood is parted with."""
        host = self.hosts[way.target]
        if way.error is not None:
            return
        try:
            if host.codec is None:
                raise ProtocolError(f"host {way.source} sends a message", expected="tensors alone")
            message = host.codec.decode(body)
        except ProtocolError as error:
            self.lose(way, error)
            self.part(way.source, way.target, "the end of the stream between two frames")
        else:
            host.inbox.append(Heard(peer=way.source, message=message, nbytes=len(body)))

    def goodbye(self, way: _Way) -> None:
        """Let the source close in good order: all that is on its way comes before that."""
        error = closed(f"host {way.source}", "more frames", "a goodbye")

        def arrive() -> None:
            self._note(way, error)
            way.come.append(error)
            way.deliver()

        if not way.silent:
            self.at(self._arrival(way), arrive)
        way.silent = True

    def part(self, node: str, peer: str, found: str) -> None:
        """End the connections of two hosts at once; both see that the other is gone."""
        for source, target in ((node, peer), (peer, node)):
            self.lose(self._ways[source, target], closed(f"host {source}", "a goodbye", found))

    def lose(self, way: _Way, error: NetworkError) -> None:
        """Let the receiver take the source for lost, with all that is on its way."""
        way.silent = True
        self._note(way, error)
        way.expected.fail(error)
        way.come.clear()

    def _note(self, way: _Way, error: NetworkError) -> None:
        if way.error is None:
            way.error = error
            self.hosts[way.target].inbox.append(Heard(peer=way.source, error=error))
            for transfer in self._ways[way.target, way.source].under_way:
                transfer.fail(error.awaiting(transfer.what))

    def _arrival(self, way: _Way, late: float = 0.0) -> float:
        way.last_arrival = max(way.last_arrival, self.now + LATENCY) + late
        return way.last_arrival

    def _arrive(self, way: _Way, tensor: _Tensor) -> None:
        if way.error is None:
            way.come.append(tensor)
            self.deliver(way)

    def deliver(self, way: _Way) -> None:
        """Put what is expected into place; a sender of anything else is parted with."""
        try:
            way.deliver()
        except ProtocolError as error:
            self.lose(way, error)
            self.part(way.source, way.target, "the end of the stream between two frames")

    def _strike(self, fault: NetworkFault, way: _Way, tensor: _Tensor) -> None:
        match fault.kind:
            case "delay":
                self._arrival(way, fault.seconds)
            case "cut":
                self.at(self._arrival(way), lambda: self._cut(way, tensor, fault.keep))
                way.silent = True
            case "drop":
                way.silent = True
            case "stall":
                way.silent = self._ways[way.target, way.source].silent = True
            case "close":
                self.goodbye(way)

    def _cut(self, way: _Way, tensor: _Tensor, keep: int) -> None:
        come = way.cut(tensor, keep)
        self.part(way.source, way.target, f"the end of the stream after {come}")

    def _somebody_goes_on(self) -> bool:
        return any(waiter.ready() or waiter.limit <= self.now for waiter in self._waiters)

    def _advance(self) -> None:
        """Let time pass until something happens, or somebody has waited long enough."""
        until = min(waiter.limit for waiter in self._waiters)
        if self._events:
            until = min(until, self._events[0][0])
        self.now = max(self.now, until)
        while self._events and self._events[0][0] <= self.now:
            heapq.heappop(self._events)[2]()
        self.lock.notify_all()


class MemoryTransport:
    """A `Transport` to the other hosts of its `Network`."""

    def __init__(self, network: Network, hello: Hello, codec: Codec[Message] | None) -> None:
        self.node, self.hello, self.codec = hello.node, hello, codec
        self.inbox: deque[Heard] = deque()
        self._network = network

    @property
    def peers(self) -> tuple[str, ...]:
        net = self._network
        with net.lock:
            return tuple(
                sorted(
                    peer
                    for peer in net.peers(self.node)
                    if net.way(peer, self.node, node=self.node, what="").error is None
                )
            )

    def send(self, peer: str, key: Key, data: memoryview) -> PendingTransfer:
        body, net = as_bytes(data), self._network
        transfer = sending(peer, key, net.wait_for)
        start = head(key.kind, step=key.step, tag=key.tag, length=len(body))
        with net.lock:
            way = self._way_to(peer, transfer.what)
            net.send(way, _Tensor(head=start, body=body, transfer=transfer))
        return transfer

    def expect(self, peer: str, key: Key, into: memoryview) -> PendingTransfer:
        net = self._network
        with net.lock:
            way = net.way(peer, self.node, node=self.node, what=f"{key} from host {peer}")
            transfer = way.expected.expect(key, into)
            net.deliver(way)
        return transfer

    def tell(self, peer: str, message: Message) -> None:
        body = message_frame(Kind.CONTROL, message)[HEADER.size :]
        with self._network.lock:
            way = self._way_to(peer, f"that host {peer} takes a message")
            self._network.tell(way, body)

    def hear(self, timeout: float) -> Heard:
        if not self._network.wait(lambda: bool(self.inbox), timeout):
            raise timed_out(" or ".join(self.peers), "a message", timeout, "none")
        return self.inbox.popleft()

    def drop(self, peer: str, reason: str) -> None:
        net = self._network
        with net.lock:
            if peer not in net.peers(self.node):
                return
            way = net.way(peer, self.node, node=self.node, what="")
            net.lose(way, closed(f"host {peer}", "nothing any more", f"dropped here: {reason}"))
            net.part(self.node, peer, "the end of the stream between two frames")

    def close(self) -> None:
        net = self._network
        with net.lock:
            ways = [
                net.way(self.node, peer, node=self.node, what="") for peer in net.peers(self.node)
            ]
            transfers = [transfer for way in ways for transfer in way.under_way]
            net.wait(lambda: all(each.ended for each in transfers), GOODBYE_SECONDS)
            for peer in net.peers(self.node):
                net.goodbye(net.way(self.node, peer, node=self.node, what=""))
                here = net.way(peer, self.node, node=self.node, what="")
                net.lose(here, closed(f"host {self.node}", "nothing any more", "it ended here"))

    def _way_to(self, peer: str, what: str) -> _Way:
        net = self._network
        error = net.way(peer, self.node, node=self.node, what=what).error
        if error is not None:
            raise error.awaiting(what)
        return net.way(self.node, peer, node=self.node, what=what)
