"""Hosts that come, go, come back and die: what the transport between them makes of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from lockstep.errors import PeerClosedError, PeerTimeoutError
from lockstep.net import handshake as hellos
from lockstep.net import tcp_transport as tcp
from lockstep.net.frames import Kind, head
from lockstep.net.sockets import handshake, receive_message, wrap
from lockstep.net.tcp_transport import TcpTransport
from lockstep.net.tls_stream import Deadline
from lockstep.net.transport import Key
from tests.support.tls_hosts import FACTS, LIMIT, SAID, Cluster, Said, connect
from tests.support.tls_peers import (
    HELLO,
    Job,
    Log,
    cluster,
    dial,
    hello_frame,
    job,
    rest,
    welcomed,
)

__all__ = ["cluster", "job"]  # fixtures


def test_the_same_name_twice(job: Job, cluster: Cluster) -> None:
    twin = cluster.transport("b")
    try:
        with pytest.raises(PeerTimeoutError, match="no connection with host a") as caught:
            twin.connect({"a": job.a.address}, 0.3)
        assert "connected already" in caught.value.found
    finally:
        twin.close()
    assert "connected already" in job.log.next()[1]
    assert job.a.peers == ("b",)
    job.b.tell("a", Said(text="still here"))
    assert job.a.hear(LIMIT).message == Said(text="still here")


def test_a_host_comes_back(job: Job, cluster: Cluster) -> None:
    job.b.close()
    assert isinstance(job.a.hear(LIMIT).error, PeerClosedError)
    assert job.log.empty(), "it has said goodbye"
    job.b = cluster.transport("b")
    connect([job.a, job.b])
    job.check()


def test_a_server_connects_back(cluster: Cluster) -> None:
    """With `answer`, only the newcomers know addresses; and they may come again."""
    log = Log()
    server = TcpTransport(
        cluster.identity("a"), job="job", facts=FACTS, codec=SAID, answer=True, report=log
    )
    with contextlib.closing(server):
        for round_ in range(2):
            b, c = cluster.transport("b"), cluster.transport("c")
            with contextlib.closing(b), contextlib.closing(c):
                for each in (b, c):
                    each.connect({"a": server.address}, LIMIT)
                    each.tell("a", Said(number=round_, text=each.node))
                    heard = server.hear(LIMIT)
                    assert heard.message == Said(number=round_, text=each.node)
                    server.tell(each.node, Said(text=each.node))
                    assert each.hear(LIMIT).message == Said(text=each.node)
                assert server.peers == ("b", "c")
            assert {server.hear(LIMIT).peer, server.hear(LIMIT).peer} == {"b", "c"}
            assert list(server.peers) == []
            assert log.empty(), "they have said goodbye"


def test_a_machine_with_two_addresses(cluster: Cluster) -> None:
    """It listens at one, and connects from the other."""
    server = TcpTransport(cluster.identity("a"), job="job", facts=FACTS, codec=SAID, answer=True)
    newcomer = TcpTransport(
        cluster.identity("b"), job="job", facts=FACTS, codec=SAID, host="127.0.0.2"
    )
    with contextlib.closing(server), contextlib.closing(newcomer):
        newcomer.connect({"a": server.address}, LIMIT)
        newcomer.tell("a", Said(text="here"))
        assert server.hear(LIMIT).message == Said(text="here")
        server.tell("b", Said(text="there"))
        assert newcomer.hear(LIMIT).message == Said(text="there")


@pytest.mark.parametrize(
    ("named", "source", "reached"),
    [
        ("", "10.0.0.1", "10.0.0.1"),
        ("10.1.0.2", "10.0.0.1", "10.1.0.2"),
        ("0.0.0.0", "10.0.0.1", "10.0.0.1"),
        ("127.0.0.1", "10.0.0.1", "10.0.0.1"),  # its own, not this machine's
        ("127.0.0.2", "127.0.0.1", "127.0.0.2"),
        ("1.2.3", "10.0.0.1", "10.0.0.1"),
    ],
)
def test_where_a_host_is_reached(named: str, source: str, reached: str) -> None:
    hello = hellos.Hello(job="j", node="b", host=named, port=7)
    assert hellos.peer_address(hello, source) == (reached, 7)


def test_who_cannot_be_connected_back_is_dropped(cluster: Cluster) -> None:
    log = Log()
    server = TcpTransport(
        cluster.identity("a"), job="job", facts=FACTS, codec=SAID, answer=True, report=log
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with contextlib.closing(server):
        sock = wrap(
            socket.create_connection(server.address),
            cluster.identity("m").client_context(),
            server=False,
        )
        with sock:
            handshake(sock, Deadline(LIMIT))
            sock.sendall(hello_frame(**{**HELLO, "stream": "control", "port": port}))
            kind, answer = receive_message(sock, {Kind.WELCOME: hellos.HELLO}, Deadline(LIMIT))
            assert (kind, answer.port) == (Kind.WELCOME, server.address[1])
            assert rest(sock) == b""
        who, why = log.next()
        assert who == "m"
        assert f"host m at 127.0.0.1:{port} closed the connection" in why
        assert server.peers == ()


def test_nobody_is_there(job: Job) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    with pytest.raises(PeerTimeoutError, match="no connection with host y") as caught:
        job.a.connect({"b": job.b.address, "y": address}, 0.2)
    assert "refused" in caught.value.found
    while not job.log.empty():
        job.log.next()
    job.check()


def test_a_death_in_the_middle_of_a_tensor(job: Job, cluster: Cluster) -> None:
    with welcomed(job, cluster.identity("m")) as sock:
        receipt = job.a.expect("m", Key(Kind.REDUCED, 4, 9), memoryview(bytearray(1000)))
        sock.sendall(head(Kind.REDUCED, step=4, tag=9, length=1000) + bytes(400))
    with pytest.raises(PeerClosedError, match="host m") as caught:
        receipt.wait(LIMIT)
    assert caught.value.expected == "reduced 9 of step 4 from host m"
    assert "after 400 of 1,000 bytes of reduced 9 of step 4" in caught.value.found
    assert "400 of 1,000" in job.log.next()[1]
    job.check()


CHILD = """
import sys
from pathlib import Path
from lockstep.net import handshake as hellos
from lockstep.net.frames import Kind
from lockstep.net.identity import Identity
from lockstep.net.tls_stream import TlsStream
from lockstep.net.tcp_transport import TcpTransport
from lockstep.net.transport import Key
from tests.support.tls_hosts import SAID, Said
folder, host, port, torch = sys.argv[1:]
child = TcpTransport(Identity.load(Path(folder)), job="job", facts=eval(torch), codec=SAID)
print(*child.address, flush=True)
child.connect({"a": (host, int(port))}, 20)
memory = bytearray(8 << 20)
child.send("a", Key(Kind.STATE, 0), memoryview(memory)).wait(20)
child.tell("a", Said(text="ready"))
child.hear(600)
"""


def test_stopped_and_killed_hosts_are_told_apart(job: Job, cluster: Cluster) -> None:
    """With a real process: stopped, it is silent; killed, it is gone."""
    folder = cluster.identity("child").folder
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), *map(str, job.a.address), repr(FACTS)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        host, port = child.stdout.readline().split()
        job.a.connect({"child": (host, int(port))}, LIMIT)
        state = job.a.expect("child", Key(Kind.STATE, 0), memoryview(bytearray(8 << 20)))
        state.wait(LIMIT)
        assert job.a.hear(LIMIT).message == Said(text="ready")
        os.kill(child.pid, signal.SIGSTOP)
        receipt = job.a.expect("child", Key(Kind.PARTIAL, 1), memoryview(bytearray(10)))
        with pytest.raises(PeerTimeoutError, match="host child did not answer in time") as caught:
            receipt.wait(0.05)
        assert "partial 0 of step 1" in caught.value.expected
        assert "the last bytes came" in caught.value.found
        assert job.a.peers == ("b", "child")
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(PeerClosedError, match="host child closed"):
            receipt.wait(LIMIT)
        assert job.a.hear(LIMIT).peer == "child"
        assert job.log.next()[0] == "child"
    finally:
        child.kill()
        child.communicate()
    job.check()


def test_closing_ends_those_who_dawdle(job: Job, cluster: Cluster) -> None:
    slow = dial(job, cluster.identity("m").client_context())
    silent = [socket.create_connection(job.a.address) for _ in range(tcp.MAX_HANDSHAKES + 2)]
    try:
        job.close()
    finally:
        for sock in (*silent, slow):
            sock.close()


def test_no_thread_remains(cluster: Cluster) -> None:
    job = Job(cluster)
    names = [thread.name for thread in threading.enumerate()]
    assert any(name.startswith("lockstep-net") for name in names)
    job.close()
    assert not [each for each in threading.enumerate() if each.name.startswith("lockstep-net")]
