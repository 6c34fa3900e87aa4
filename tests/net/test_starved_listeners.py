"""Listeners whose places, descriptors or threads are used up: they go on, and say so."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path

import pytest

from lockstep.net import tcp_transport as tcp
from lockstep.net.enrolment import join
from tests.support.joinable_cluster import Joinable, joinable
from tests.support.no_descriptors import no_descriptors
from tests.support.tls_hosts import LIMIT, Cluster, connect
from tests.support.tls_peers import Job, cluster, job

__all__ = ["cluster", "job", "joinable"]  # fixtures

RECORD = b"\x16\x03\x01\x02\x00" + b"\x01" * 512
"""The head of a TLS record, and some of what it promises."""
STRANGERS = 48


class Dawdlers:
    """Strangers that send a record byte by byte, each byte long before any limit."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socks = [
            socket.create_connection(address, source_address=(f"127.0.0.{2 + n % 3}", 0))
            for n in range(STRANGERS)
        ]
        self.ended = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for byte in RECORD:
            for sock in [*self.socks]:
                try:
                    sock.send(bytes([byte]))
                except OSError:
                    self.socks.remove(sock)
                    sock.close()
                    self.ended += 1
            if self._stop.wait(0.1):
                return

    def await_end(self) -> None:
        limit = time.monotonic() + LIMIT
        while self.ended < STRANGERS and time.monotonic() < limit:
            time.sleep(0.05)
        assert self.ended == STRANGERS, "each has come to its end"

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        for sock in self.socks:
            sock.close()


def test_dawdlers_keep_no_host_out(
    job: Job, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "HANDSHAKE_SECONDS", 2.0)
    with contextlib.closing(Dawdlers(job.a.address)) as dawdlers:
        c = cluster.transport("c")
        with contextlib.closing(c):
            connect([job.a, c])
            assert job.a.peers == ("b", "c")
        assert job.a.hear(LIMIT).peer == "c"
        dawdlers.await_end()
    while not job.log.empty():
        job.log.next()
    job.check()


def test_dawdlers_keep_no_newcomer_out(joinable: Joinable, tmp_path: Path) -> None:
    server = joinable.serve(seconds=2.0)
    with contextlib.closing(server), contextlib.closing(Dawdlers(server.address)) as dawdlers:
        join(server.token(), tmp_path / "late", "late", timeout=LIMIT)
        dawdlers.await_end()


def test_a_moment_without_descriptors(job: Job, joinable: Joinable, tmp_path: Path) -> None:
    with socket.socket() as one, socket.socket() as two, no_descriptors():
        one.connect(job.a.address)
        two.connect(joinable.server.address)
        assert "Too many open files" in job.log.next()[1]
        assert "Too many open files" in joinable.why()
    join(joinable.server.token(), tmp_path / "after", "after", timeout=LIMIT)
    time.sleep(0.2)
    while not job.log.empty():
        job.log.next()
    job.check()


def test_a_thread_that_cannot_be_started(
    job: Job, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name.startswith("lockstep-net 127."):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        with socket.create_connection(job.a.address):
            assert "can't start new thread" in job.log.next()[1]
    c = cluster.transport("c")
    with contextlib.closing(c):
        connect([job.a, c])
    assert job.a.hear(LIMIT).peer == "c"
    job.check()
