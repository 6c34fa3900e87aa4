"""The link between agents and their master: small messages, signs of life, and silence."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from lockstep.errors import NetworkError, PeerTimeoutError
from lockstep.net.transport import Heard, Transport

ALIVE_SECONDS = 0.25
"""Between two signs of life."""
LONGEST_LOOK = 0.5
"""Seconds: no more than this counts as silence between two looks: who was stopped itself cannot
tell that others were silent."""

Serve = Callable[[str, Mapping[str, Any]], None]


class ControlLink:
    """Hears in a thread of its own, so that a sign of life never waits for work to end.

    `fileno` is readable when there is something to take.
    """

    def __init__(self, transport: Transport, serve: Serve | None = None) -> None:
        """`serve` is called in the link's thread with each message that asks to `fetch`."""
        self.transport = transport
        self._serve = serve
        self._waiting: deque[Heard] = deque()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._silent: dict[str, float] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lockstep link", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._event

    def tell(self, peer: str, op: str, **fields: Any) -> None:
        """Send a message; to one that is lost, in vain: its loss will be heard of."""
        with contextlib.suppress(NetworkError):
            self.transport.tell(peer, {"op": op, **fields})

    def wake(self) -> None:
        """Make `fileno` readable. May be called from any thread."""
        with contextlib.suppress(OSError):
            os.eventfd_write(self._event, 1)

    def take(self) -> list[Heard]:
        """What was heard since the last call."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        taken = []
        while self._waiting:
            taken.append(self._waiting.popleft())
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
        looked, told = time.monotonic(), 0.0
        while not self._closing.is_set():
            heard: Heard | None = None
            with contextlib.suppress(PeerTimeoutError):
                heard = self.transport.hear(ALIVE_SECONDS / 2)
            now = time.monotonic()
            passed, looked = min(now - looked, LONGEST_LOOK), now
            for peer in self.transport.peers:
                self._silent[peer] = self._silent.get(peer, 0.0) + passed
            if heard is not None:
                self._note(heard)
            if now - told >= ALIVE_SECONDS:
                told = now
                for peer in self.transport.peers:
                    self.tell(peer, "alive")

    def _note(self, heard: Heard) -> None:
        self._silent[heard.peer] = 0.0
        message: Mapping[str, Any] = heard.message or {}
        if heard.error is None and message.get("op") == "alive":
            return
        if self._serve is not None and message.get("op") == "fetch":
            self._serve(heard.peer, message)
            return
        self._waiting.append(heard)
        self.wake()
