"""A cluster that newcomers can join, and what it has said of each."""

from __future__ import annotations

import contextlib
import queue
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.net.certificates import Role
from lockstep.net.enrolment import ANSWERS, SHOWN, EnrolmentRequest, JoinServer, Limiter
from lockstep.net.frames import Kind, message_frame
from lockstep.net.handshake import Refusal
from lockstep.net.identity import newcomer_context
from lockstep.net.sockets import handshake, receive_message, wrap
from lockstep.net.tls_stream import Deadline, TlsStream
from lockstep.system.messages import ErrorMessage, encode
from tests.support.tls_hosts import LIMIT, Cluster, Said


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
            self.cluster.identity("a", role=Role.HEAD),
            self.cluster.authority.sign,
            greeting=encode(Said(number=7)),
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
        receive_message(secured, {Kind.AUTHORITY: SHOWN}, Deadline(LIMIT))
        return secured

    def refused(self, secret: bytes, request: bytes) -> ErrorMessage:
        """Why a newcomer with this secret is refused."""
        with self.dial() as sock:
            said = EnrolmentRequest(secret=secret, request=request)
            sock.sendall(message_frame(Kind.ENROL, said))
            _, answer = receive_message(sock, ANSWERS, Deadline(LIMIT))
        assert isinstance(answer, Refusal)
        return answer.error


@pytest.fixture
def joinable(tmp_path: Path) -> Iterator[Joinable]:
    made = Joinable(tmp_path / "cluster")
    with contextlib.closing(made.server):
        yield made


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
