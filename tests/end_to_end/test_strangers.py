"""Strangers at every port of a job that runs: it goes on, and its bits are the same."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from lockstep.net import counted_report
from lockstep.net.frames import HEADER, MAGIC, VERSION, Kind, message_frame
from lockstep.net.handshake import Hello
from lockstep.net.sockets import handshake, wrap
from lockstep.net.tls_stream import Deadline
from tests.support.fuzzing import ended, number
from tests.support.harmed_runs import assert_same, events, yard
from tests.support.multi_host_runs import PACED, WAIT, Live, Site, site
from tests.support.ray_cluster import GATE
from tests.support.tls_hosts import LIMIT, Cluster

__all__ = ["site", "yard"]  # fixtures

TASK = "tests.support.gated_task:Gated"
LISTENING = "0A"


def ports_of(pid: int) -> set[int]:
    """The TCP ports at which a process listens."""
    held = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            held.add(os.readlink(entry))
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return {
        int(row[1].partition(":")[2], 16)
        for row in rows
        if row[3] == LISTENING and f"socket:[{row[9]}]" in held
    }


def no_certificate() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def of_cluster(cluster: Cluster) -> ssl.SSLContext:
    """A host `m` of a cluster, that does not care who answers."""
    context = cluster.identity("m").client_context()
    context.verify_mode = ssl.CERT_NONE
    return context


def draw(rng: random.Random, job: str) -> bytes:
    """Junk, a hello that is cut or prolonged or of another job, or a frame of any length."""
    hello = Hello(job=rng.choice((job, "other")), node=rng.choice("mb"), facts={})
    said = message_frame(Kind.HELLO, hello.with_stream("data"))
    head = HEADER.pack(
        MAGIC, VERSION, rng.randrange(30), 0, 0, 0, rng.getrandbits(rng.choice((6, 64)))
    )
    return rng.choice(
        (
            b"",
            rng.randbytes(rng.randrange(200)),
            said[: rng.randrange(len(said))],
            said + rng.randbytes(rng.randrange(1, 60)),
            head + rng.randbytes(rng.randrange(60)),
        )
    )  # fmt: skip


def call(port: int, context: ssl.SSLContext | None, said: bytes) -> None:
    """Say something at a port, with TLS or without, and wait until the other side hangs up."""
    with contextlib.suppress(OSError):  # it may be refused at any moment
        sock = socket.create_connection(("127.0.0.1", port), LIMIT)
        try:
            if context is not None:
                sock = secured = wrap(sock, context, server=False)
                handshake(secured, Deadline(LIMIT))
            sock.sendall(said)
            socket.socket.shutdown(sock, socket.SHUT_WR)
            sock.settimeout(LIMIT)
            while sock.recv(4096):
                pass
        finally:
            sock.close()


@pytest.mark.long
@pytest.mark.fuzz
def test_strangers_at_every_port_of_a_job(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    monkeypatch.setattr(counted_report, "LISTED", 10**6)
    monkeypatch.setenv(GATE, str(gate))
    own = ports_of(os.getpid())
    on = site.agents({"b": 1, "c": 1}, 1)
    live = Live(site, on, task=TASK, steps=400)
    live.await_host("c")
    pids = {"a": os.getpid(), "b": on.processes["b"].pid, "c": on.processes["c"].pid}
    ports = sorted(port for pid in pids.values() for port in ports_of(pid) - own)
    assert len(ports) >= 2 * len(pids)  # one for the master, one for the other hosts
    strangers = Cluster(tmp_path / "strangers")
    offer = on.offered
    contexts: list[Callable[[], ssl.SSLContext | None]] = [
        lambda: None, no_certificate, lambda: of_cluster(strangers), lambda: of_cluster(on.cluster),
    ]  # fmt: skip
    rng, inputs = random.Random(1), number(60)
    for _ in range(inputs):
        call(rng.choice(ports), rng.choice(contexts)(), draw(rng, offer.job))
    gate.unlink()
    found = live.run.result(WAIT)
    assert_same(found, site.yard.undisturbed(TASK, **PACED, steps=400))
    assert not events(found.folder, "host_lost")
    assert set(on.wait().values()) == {0}
    reasons = [f"{each['peer']}: {each['why']}" for each in events(found.folder, "connection")]
    for name in ("b", "c"):
        reasons += re.split(r"^(?=\S+: )", on.log(name), flags=re.MULTILINE)
    told = [
        each.partition(": ")[2] for each in reasons if re.match(r"127\.0\.0\.1:\d+: |m: ", each)
    ]
    assert len(told) >= inputs / 2
    for why in told:
        ended(why)
