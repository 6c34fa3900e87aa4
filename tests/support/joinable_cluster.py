"""A cluster that newcomers can join, and what it has said of each."""

from __future__ import annotations

import base64
import contextlib
import queue
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.net.enrolment import JoinServer, Limiter
from lockstep.net.frames import Kind, message_frame
from lockstep.net.identity import newcomer_context
from lockstep.net.sockets import Deadline, handshake, receive_message, wrap
from lockstep.net.tls_stream import TlsStream
from tests.support.tls_hosts import LIMIT, Cluster


class Joinable:
    """A cluster whose host `a` enrols newcomers, and says why it refuses some."""

    def __init__(self, folder: Path) -> None:
        self.cluster = Cluster(folder)
        self.reports: queue.Queue[tuple[str, str]] = queue.Queue()
        self.server = self.serve()

    def serve(
        self, *, limiter: Limiter | None = None, seconds: float = LIMIT, proof: str = ""
    ) -> JoinServer:
        return JoinServer(
            self.cluster.identity("a"),
            self.cluster.authority.sign,
            greeting={"agent": ["127.0.0.1", 7]},
            proof=proof,
            limiter=limiter or Limiter(burst=100_000),
            report=lambda who, why: self.reports.put((who, why)),
            serve_seconds=seconds,
        )

    def why(self) -> str:
        return self.reports.get(timeout=LIMIT)[1]

    def dial(self, server: JoinServer | None = None) -> TlsStream:
        """A newcomer that has done everything right so far."""
        sock = socket.create_connection((server or self.server).address)
        context = newcomer_context(self.cluster.authority.certificate)
        secured = wrap(sock, context, server=False)
        handshake(secured, Deadline(LIMIT))
        receive_message(secured, (Kind.AUTHORITY,), Deadline(LIMIT))
        return secured

    def ask(self, secret: bytes, request: bytes) -> tuple[Kind, dict[str, object]]:
        with self.dial() as sock:
            said = {"secret": base64.b64encode(secret).decode(), "request": request.decode()}
            sock.sendall(message_frame(Kind.ENROL, said))
            return receive_message(sock, (Kind.ENROLLED, Kind.REFUSED), Deadline(LIMIT))


@pytest.fixture
def joinable(tmp_path: Path) -> Iterator[Joinable]:
    made = Joinable(tmp_path / "cluster")
    with contextlib.closing(made.server):
        yield made


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
