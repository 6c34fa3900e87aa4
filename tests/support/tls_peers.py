"""Two connected hosts, and what connects to them without going by the protocol."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lockstep.net.frames import Kind, head
from lockstep.net.handshake import HELLO as HELLO_CODEC
from lockstep.net.handshake import Hello
from lockstep.net.identity import Identity
from lockstep.net.sockets import handshake, receive_message, wrap
from lockstep.net.tls_stream import Deadline, TlsStream
from lockstep.net.transport import Key
from tests.support.tls_hosts import FACTS, LIMIT, Cluster, connect

HELLO: dict[str, Any] = {
    name: getattr(Hello(job="job", node="m", facts=FACTS), name)
    for name in ("job", "node", "facts", "protocol", "port")
}
"""The fields of what host m says first."""


def hello_frame(**fields: Any) -> bytes:
    """A frame with these fields in the place of a hello, whatever they are."""
    body = msgspec.msgpack.encode({"op": "Hello", **fields})
    return head(Kind.HELLO, length=len(body)) + body


class Log:
    """What a transport has reported; a test waits for each report."""

    def __init__(self) -> None:
        self._reports: queue.Queue[tuple[str, str]] = queue.Queue()

    def __call__(self, who: str, why: str) -> None:
        self._reports.put((who, why))

    def next(self) -> tuple[str, str]:
        return self._reports.get(timeout=LIMIT)

    def empty(self) -> bool:
        return self._reports.empty()


class Job:
    """Host a and b, connected; `check` sees that they go on."""

    def __init__(self, cluster: Cluster) -> None:
        self.log = Log()
        self.a, self.b = cluster.transport("a", report=self.log), cluster.transport("b")
        connect([self.a, self.b])

    def check(self) -> None:
        data, into = os.urandom(1000), bytearray(1000)
        receipt = self.a.expect("b", Key(Kind.PARTIAL, 1), memoryview(into))
        self.b.send("a", Key(Kind.PARTIAL, 1), memoryview(data)).wait(LIMIT)
        receipt.wait(LIMIT)
        assert into == data
        assert self.a.peers == ("b",)
        assert self.log.empty()

    def close(self) -> None:
        self.a.close()
        self.b.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(Path(tmp_path_factory.mktemp("cluster")))


@pytest.fixture
def job(cluster: Cluster) -> Iterator[Job]:
    made = Job(cluster)
    with contextlib.closing(made):
        yield made


def dial(job: Job, context: ssl.SSLContext) -> TlsStream:
    sock = wrap(socket.create_connection(job.a.address), context, server=False)
    try:
        handshake(sock, Deadline(LIMIT))
    except BaseException:
        sock.close()
        raise
    return sock


def welcomed(job: Job, identity: Identity, stream: str = "data") -> TlsStream:
    """A connection of a host that does not go by the protocol from there on."""
    sock = dial(job, identity.client_context())
    sock.sendall(hello_frame(**{**HELLO, "node": identity.node, "stream": stream}))
    kind, _ = receive_message(sock, {Kind.WELCOME: HELLO_CODEC}, Deadline(LIMIT))
    assert kind is Kind.WELCOME
    return sock


def rest(sock: socket.socket) -> bytes:
    """What still comes until the other side closes."""
    sock.settimeout(LIMIT)
    data = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while piece := sock.recv(65536):
            data += piece
    return data
