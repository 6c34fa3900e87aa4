"""Control link: messages and heartbeats between agents and their master, and who is silent."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from lockstep.errors import NetworkError, PeerTimeoutError
from lockstep.net.transport import Heard, Transport
from lockstep.system.look_clock import LookClock
from lockstep.system.messages import Count, Message

HEARTBEAT_SECONDS = 0.25
"""Between two heartbeats."""

MAX_WAITING, MAX_WAITING_BYTES = 1 << 16, 1 << 29
"""Messages of one peer, and bytes of them, that wait to be taken: a host's predictions of a whole
evaluation, while the master is busy with its own. Who sends more is dropped."""

BlobName = Literal["code", "data"]


class Heartbeat(Message):
    """The sender is alive."""


class FetchPiece(Message):
    """The sender wants a piece of a blob."""

    blob: BlobName
    piece: Count


LINK_KINDS = Heartbeat | FetchPiece
"""Messages of the link itself: a part of every conversation on it."""
Serve = Callable[[str, FetchPiece], None]


class ControlLink:
    """Hears in a thread of its own, so that a heartbeat never waits for work to end.

    `fileno` is readable when there is something to take.
    """

    def __init__(self, transport: Transport, serve: Serve | None = None) -> None:
        """`serve` is called in the link's thread with each request for a piece of a blob. Without
        it nobody may ask for one."""
        self.transport = transport
        self._serve = serve
        self._waiting: deque[Heard] = deque()
        self._waiting_of: dict[str, tuple[int, int]] = {}
        """By peer, how many of its messages wait, and how many bytes they were."""
        self._lock = threading.Lock()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._silent: dict[str, float] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lockstep link", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._event

    def tell(self, peer: str, message: Message) -> None:
        """Send a message; to one that is lost, in vain: its loss will be heard of."""
        with contextlib.suppress(NetworkError):
            self.transport.tell(peer, message)

    def wake(self) -> None:
        """Make `fileno` readable. May be called from any thread."""
        with contextlib.suppress(OSError):
            os.eventfd_write(self._event, 1)

    def take(self) -> list[Heard]:
        """What was heard since the last call."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        with self._lock:
            taken, self._waiting = list(self._waiting), deque()
            self._waiting_of.clear()
        return taken

    def silent_for(self, peer: str) -> float:
        """For how many seconds nothing has come from a peer."""
        return self._silent.get(peer, 0.0)

    def close(self) -> None:
        """End the thread. The transport is the caller's to close, before."""
        self._closing.set()
        self._thread.join()
        os.close(self._event)

    def _run(self) -> None:
        clock, told = LookClock(), 0.0
        while not self._closing.is_set():
            heard: Heard | None = None
            with contextlib.suppress(PeerTimeoutError):
                heard = self.transport.hear(HEARTBEAT_SECONDS / 2)
            now, passed = time.monotonic(), clock.passed()
            for peer in self.transport.peers:
                self._silent[peer] = self._silent.get(peer, 0.0) + passed
            if heard is not None:
                self._note_safely(heard)
            if now - told >= HEARTBEAT_SECONDS:
                told = now
                for peer in self.transport.peers:
                    self.tell(peer, Heartbeat())

    def _note_safely(self, heard: Heard) -> None:
        """As `_note`; whatever goes wrong with it is its sender's trouble alone."""
        try:
            self._note(heard)
        except Exception as error:  # such as no memory
            self.transport.drop(heard.peer, f"its message cannot be taken: {error!r}")

    def _note(self, heard: Heard) -> None:
        self._silent[heard.peer] = 0.0
        match heard.message:
            case Heartbeat():
                return
            case FetchPiece() as wanted:
                if self._serve is None:
                    self.transport.drop(heard.peer, "it wants a blob, which is not here")
                else:
                    self._serve(heard.peer, wanted)
                return
        with self._lock:
            count, nbytes = self._waiting_of.get(heard.peer, (0, 0))
            full = count >= MAX_WAITING or nbytes + heard.nbytes > MAX_WAITING_BYTES
            if not full or heard.message is None:
                self._waiting_of[heard.peer] = (count + 1, nbytes + heard.nbytes)
                self._waiting.append(heard)
        if full and heard.message is not None:
            self.transport.drop(heard.peer, "it sends more messages than can be taken")
        self.wake()
