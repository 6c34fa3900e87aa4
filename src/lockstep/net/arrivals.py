"""Arrivals: accepted connections whose other side has not said who it is yet.

Their number is bounded, and nobody can keep others out: when there are too many, the oldest one
ends of the address that has the most.
"""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Callable

from lockstep.net.sockets import closed, end

ROOM_SECONDS = 5.0
"""The longest that one may take to end whose place is wanted."""


class Arrivals:
    """Starts a thread for each, and knows which have not come to their end."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: dict[threading.Thread, tuple[socket.socket, str]] = {}
        """The oldest first: the connection, and the address that it comes from."""
        self._changed = threading.Condition()
        self._closing = False

    def start(self, serve: Callable[[], None], sock: socket.socket, who: str, address: str) -> str:
        """Have a thread serve a connection, which calls `done`; why that cannot be, if so."""
        thread = threading.Thread(target=serve, name=f"lockstep-net {who}", daemon=True)
        with self._changed:
            if len(self._open) >= self._most:
                self._end_oldest()
                self._changed.wait_for(
                    lambda: len(self._open) < self._most or self._closing, ROOM_SECONDS
                )
            if len(self._open) >= self._most or self._closing:
                return "too many connections have not said who they are"
            self._open[thread] = (sock, address)
        try:
            thread.start()
        except RuntimeError as error:  # there are too many threads: others may end
            with self._changed:
                del self._open[thread]
            return f"its connection cannot be served: {error}"
        return ""

    def secured(self, sock: socket.socket) -> None:
        """The calling thread's connection is now this one.

        Raises:
            PeerClosedError: all are being ended.
        """
        thread = threading.current_thread()
        with self._changed:
            if self._closing:
                raise closed("this host", "a connection", "it is closing")
            self._open[thread] = (sock, self._open[thread][1])

    def done(self) -> None:
        """The calling thread's connection is welcomed, or closed."""
        with self._changed:
            self._open.pop(threading.current_thread(), None)
            self._changed.notify_all()

    def close(self) -> list[threading.Thread]:
        """End all; the threads that are to be waited for."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            for sock, _ in self._open.values():
                end(sock)
            return list(self._open)

    def _end_oldest(self) -> None:
        count = Counter(address for _, address in self._open.values())
        (busiest, _), *_ = count.most_common(1)
        end(next(sock for sock, address in self._open.values() if address == busiest))
