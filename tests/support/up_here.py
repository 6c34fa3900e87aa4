"""`lockstep up` within the test's process, and hosts of it that a test speaks for."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

from lockstep.cluster.daemon.cluster_messages import FROM_UP, AskToken, TokenAnswer
from lockstep.cluster.daemon.control_socket import ask
from lockstep.cluster.daemon.head import Head
from lockstep.cluster.daemon.reconnecting_line import JOB, facts
from lockstep.cluster.state_folder import AUTHORITY, State
from lockstep.net.certificate_authority import Authority
from lockstep.net.certificates import NODE_SECONDS
from lockstep.net.identity import Identity
from lockstep.net.tcp_transport import TcpTransport

LIMIT = 20.0


class Up:
    """An `up` in this process, and what it says."""

    def __init__(self, folder: Path, *, certificate_seconds: float = NODE_SECONDS) -> None:
        self.folder = folder / "a"
        self.said: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self.head = Head(
            State(self.folder), name="a", host="127.0.0.1", port=0,
            report=lambda who, why: self.said.put((who, why)),
            certificate_seconds=certificate_seconds,
        )  # fmt: skip
        self.authority = Authority.open(self.folder / AUTHORITY)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while (heard := self.head._events.get()) is not None:
            self.head._room.release()
            self.head._handle(heard)

    def identity(self, name: str) -> Identity:
        return self.authority.enrol(self.folder.parent / name, name)

    @contextlib.contextmanager
    def host(self, name: str) -> Iterator[TcpTransport]:
        transport = TcpTransport(self.identity(name), job=JOB, facts=facts(), codec=FROM_UP)
        with contextlib.closing(transport):
            transport.connect({"a": self.head.address}, LIMIT)
            yield transport

    def until(self, text: str) -> str:
        while text not in (why := self.said.get(timeout=LIMIT)[1]):
            pass
        return why

    def check(self) -> None:
        """It still answers."""
        assert ask(self.folder, AskToken(seconds=1.0), TokenAnswer).token

    def close(self) -> None:
        self.head._events.put(None)
        self._thread.join()
        self.head.close()
