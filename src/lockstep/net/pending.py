"""Pending: what was asked of a peer and is not done yet, and what peers have said."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from lockstep.errors import NetworkError, PeerTimeoutError, ProtocolError
from lockstep.net.frames import TENSORS, Header
from lockstep.net.transport import Heard, Key

LOOK_SECONDS = 0.5
MAX_HEARD, MAX_HEARD_BYTES = 256, 4 << 20
"""Messages of one peer, and bytes of them, that are kept until they are heard; one that says more
has to wait, and holds up no other."""


Wait = Callable[[threading.Event, float], bool]
"""Waits for an event for at most so many seconds; returns whether it has happened."""


def as_bytes(memory: memoryview) -> memoryview:
    """The same memory, byte by byte.

    Raises:
        NetworkError: it is not contiguous.
    """
    if not memory.c_contiguous:
        raise NetworkError(
            "memory for the network has gaps", expected="contiguous memory", found="strides"
        )
    return memory.cast("B")


class PendingTransfer:
    """A `Pending` that one thread completes and others wait for."""

    def __init__(
        self,
        peer: str,
        what: str,
        progress: Callable[[], str],
        wait: Wait = threading.Event.wait,
    ) -> None:
        self.peer, self.what = peer, what
        self._progress, self._wait = progress, wait
        self._ended = threading.Event()
        self._error: NetworkError | None = None

    @property
    def ended(self) -> bool:
        """Whether it is complete or has failed."""
        return self._ended.is_set()

    def done(self) -> bool:
        return self._ended.is_set() and self._error is None

    def wait(self, timeout: float) -> None:
        if not self._wait(self._ended, timeout):
            raise timed_out(self.peer, self.what, timeout, self._progress())
        if self._error is not None:
            raise self._error.awaiting(self.what)

    def finish(self) -> None:
        self._ended.set()

    def fail(self, error: NetworkError) -> None:
        """Let every wait raise `error`, unless it is complete already."""
        if not self._ended.is_set():
            self._error = error
            self._ended.set()


def sending(peer: str, key: Key, wait: Wait = threading.Event.wait) -> PendingTransfer:
    """A send that is under way."""
    return PendingTransfer(
        peer, f"that host {peer} takes {key}", lambda: "it has not taken all of it", wait
    )


class ExpectedTensors:
    """Where the tensors of one peer belong. One thread receives them; any may expect some."""

    def __init__(
        self, peer: str, progress: Callable[[], str], wait: Wait = threading.Event.wait
    ) -> None:
        self.peer = peer
        self._progress, self._wait = progress, wait
        self._expected: dict[Key, tuple[memoryview, PendingTransfer]] = {}
        self._changed = threading.Condition()
        self._error: NetworkError | None = None

    def expect(self, key: Key, into: memoryview) -> PendingTransfer:
        """Set memory aside for a key.

        Raises:
            NetworkError: the key has some already, or the peer is lost.
        """
        what = f"{key} from host {self.peer}"
        if key.kind not in TENSORS:
            raise ProtocolError(
                f"{what} is no tensor", expected=" or ".join(sorted(kind.name for kind in TENSORS))
            )
        transfer = PendingTransfer(self.peer, what, self._progress, self._wait)
        memory = as_bytes(into)
        with self._changed:
            if self._error is not None:
                raise self._error.awaiting(transfer.what)
            if key in self._expected:
                raise NetworkError(f"{transfer.what} is expected already")
            self._expected[key] = memory, transfer
            self._changed.notify_all()
        return transfer

    def find(self, header: Header) -> memoryview | None:
        """The memory that a tensor belongs into; None if nobody expects it yet.

        Raises:
            ProtocolError: it is for a tensor of another size.
        """
        key = Key(header.kind, header.step, header.tag)
        if key not in self._expected:
            return None
        memory, _ = self._expected[key]
        if len(memory) != header.length:
            raise ProtocolError(
                f"host {self.peer} sends {key} in another size",
                expected=f"{len(memory):,} bytes",
                found=f"{header.length:,} bytes",
            )
        return memory

    def await_target(self, header: Header, check: Callable[[], None] = lambda: None) -> memoryview:
        """As `find`, but waits until somebody expects it. Ends by that, or by the peer's loss;
        `check` raises where nothing else would tell of that."""
        with self._changed:
            while self._error is None:
                memory = self.find(header)
                if memory is not None:
                    return memory
                check()
                self._changed.wait(LOOK_SECONDS)
            raise self._error

    def arrived(self, header: Header) -> None:
        """Complete a receipt, whose bytes are in place."""
        with self._changed:
            found = self._expected.pop(Key(header.kind, header.step, header.tag), None)
        if found is not None:  # else the peer was lost at the last moment
            found[1].finish()

    def fail(self, error: NetworkError) -> None:
        """Fail what is expected, and whatever will be."""
        with self._changed:
            if self._error is not None:
                return
            self._error = error
            transfers = [transfer for _, transfer in self._expected.values()]
            self._expected.clear()
            self._changed.notify_all()
        for transfer in transfers:
            transfer.fail(error)


class Inbox:
    """What all peers have said and nobody has heard yet, in the order in which it came.

    Bounded for each peer.
    """

    def __init__(self) -> None:
        self._heard: deque[Heard] = deque()
        self._kept: dict[str, tuple[int, int]] = {}
        """By peer, how many messages are here, and how many bytes they were."""
        self._changed = threading.Condition()

    def put(self, heard: Heard, give_up: Callable[[], bool]) -> None:
        """Add what was heard; waits until there is room for more of its peer, or until `give_up()`,
        and then adds it all the same.

        Whoever makes that true calls `wake`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._has_room(heard.peer) or give_up())
            self._count(heard, 1)
            self._heard.append(heard)
            self._changed.notify_all()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def get(self, timeout: float, waiting_for: Callable[[], str]) -> Heard:
        """What was heard first.

        Raises:
            PeerTimeoutError: nothing within `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._heard), timeout):
                raise timed_out(waiting_for(), "a message", timeout, "none")
            heard = self._heard.popleft()
            self._count(heard, -1)
            self._changed.notify_all()
            return heard

    def _has_room(self, peer: str) -> bool:
        messages, nbytes = self._kept.get(peer, (0, 0))
        return messages < MAX_HEARD and nbytes < MAX_HEARD_BYTES

    def _count(self, heard: Heard, sign: int) -> None:
        messages, nbytes = self._kept.pop(heard.peer, (0, 0))
        if messages + sign:
            self._kept[heard.peer] = (messages + sign, nbytes + sign * heard.nbytes)


def timed_out(peer: str, what: str, timeout: float, found: str) -> PeerTimeoutError:
    """The error of a wait whose time is up."""
    return PeerTimeoutError(
        f"host {peer} did not answer in time",
        expected=f"{what} within {timeout:g} s",
        found=found,
        fix="see whether that host is stopped, overloaded or cut off",
    )


class Recency:
    """How long ago something came from a peer. Written by one thread."""

    def __init__(self) -> None:
        self._at = time.monotonic()

    def touch(self) -> None:
        self._at = time.monotonic()

    def __str__(self) -> str:
        return f"the last bytes came {time.monotonic() - self._at:.1f} s ago"
