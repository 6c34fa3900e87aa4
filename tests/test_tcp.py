"""The transport between hosts against those that it must not trust, and against dying hosts."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lockstep.errors import PeerClosedError, PeerTimeoutError, ProtocolError, RefusedError
from lockstep.net import tcp
from lockstep.net.frames import HEADER, MAGIC, VERSION, Kind, head, message_frame
from lockstep.net.handshake import Hello
from lockstep.net.identity import Identity
from lockstep.net.stream import TlsStream
from lockstep.net.tcp import TcpTransport
from lockstep.net.transport import Key
from lockstep.net.wire import Deadline, handshake, receive_message, wrap
from tests.fuzzing import ended, fuzz
from tests.hosts import FACTS, LIMIT, Cluster, connect

HELLO = Hello(job="job", node="m", facts=FACTS).to_message()


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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(Path(tmp_path_factory.mktemp("cluster")))


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Another cluster, with a CA of its own."""
    return Cluster(Path(tmp_path_factory.mktemp("strangers")))


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


def welcomed(job: Job, identity: Identity, lane: str = "data") -> TlsStream:
    """A lane of a host that does not go by the protocol from there on."""
    sock = dial(job, identity.client_context())
    sock.sendall(message_frame(Kind.HELLO, {**HELLO, "node": identity.node, "lane": lane}))
    kind, _ = receive_message(sock, (Kind.WELCOME,), Deadline(LIMIT))
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


def test_listens_on_loopback_unless_told_otherwise(job: Job) -> None:
    assert job.a.address[0] == "127.0.0.1"
    assert job.a.address[1] != 0


@fuzz(100)
@given(junk=st.binary(max_size=200))
def test_strangers_that_send_anything(job: Job, junk: bytes) -> None:
    with socket.create_connection(job.a.address) as sock:
        with contextlib.suppress(OSError):  # it may be refused after the first bytes
            sock.sendall(junk)
            sock.shutdown(socket.SHUT_WR)
        who, why = job.log.next()
        assert who.startswith("127.0.0.1:")
        assert "TLS" in why or "closed" in why
        rest(sock)
    job.check()
    ended(why)


def no_certificate(cluster: Cluster, strangers: Cluster) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def of_another_authority(cluster: Cluster, strangers: Cluster) -> ssl.SSLContext:
    context = strangers.identity("b").client_context()
    context.verify_mode = ssl.CERT_NONE  # it does not care who answers
    return context


def expired(cluster: Cluster, strangers: Cluster) -> ssl.SSLContext:
    return cluster.identity("late", seconds=60, now=time.time() - 3600).client_context()


def old_tls(cluster: Cluster, strangers: Cluster) -> ssl.SSLContext:
    context = cluster.identity("m").client_context()
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


WRONG: dict[Callable[[Cluster, Cluster], ssl.SSLContext], str] = {
    no_certificate: "PEER_DID_NOT_RETURN_A_CERTIFICATE",
    of_another_authority: "self-signed certificate in certificate chain",
    expired: "certificate has expired",
    old_tls: "UNSUPPORTED_PROTOCOL",
}
JUNK = st.binary(max_size=200)


@fuzz(60)
@given(client=st.sampled_from(list(WRONG)), said=st.just(message_frame(Kind.HELLO, HELLO)) | JUNK)
def test_wrong_certificates(
    job: Job,
    cluster: Cluster,
    strangers: Cluster,
    client: Callable[[Cluster, Cluster], ssl.SSLContext],
    said: bytes,
) -> None:
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        sock = dial(job, client(cluster, strangers))  # the client learns it only when it reads
        with sock:
            sock.sendall(said)
            assert rest(sock) == b""
    _, why = job.log.next()
    assert WRONG[client] in why
    job.check()
    ended(why)


def test_a_server_of_another_authority(job: Job, strangers: Cluster) -> None:
    stranger = strangers.transport("c")
    try:
        with pytest.raises(RefusedError, match="is not accepted"):
            stranger.connect({"a": job.a.address}, LIMIT)
        assert job.log.next()[0].startswith("127.0.0.1:")
    finally:
        stranger.close()
    job.check()


def test_a_host_that_answers_under_another_name(job: Job, cluster: Cluster) -> None:
    c = cluster.transport("c")
    try:
        with pytest.raises(RefusedError, match="is another") as caught:
            c.connect({"z": job.a.address}, LIMIT)
        assert (caught.value.expected, caught.value.found) == ("z", "a")
        assert job.log.next()[0] == "c"
    finally:
        c.close()
    job.check()


@fuzz(100)
@given(
    junk=st.binary(max_size=200)
    | st.builds(
        lambda cut, extra: message_frame(Kind.HELLO, {**HELLO, "lane": "data"})[:cut] + extra,
        st.integers(0, 200),
        st.binary(min_size=1, max_size=5),
    )
    | st.builds(
        lambda kind, length, body: HEADER.pack(MAGIC, VERSION, kind, 0, 0, 0, length) + body,
        st.sampled_from(Kind) | st.integers(0, 255),
        st.integers(0, 50) | st.integers(0, 2**64 - 1),
        st.binary(max_size=50),
    )
)
def test_hosts_that_say_anything_first(job: Job, cluster: Cluster, junk: bytes) -> None:
    with dial(job, cluster.identity("m").client_context()) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(junk)
            socket.socket.shutdown(sock, socket.SHUT_WR)
        who, why = job.log.next()
        assert who == "m"
        assert "protocol" in why or "closed" in why
        rest(sock)
    job.check()
    ended(why)


@fuzz(100)
@given(
    tensor=st.just(60) | st.integers(0, 60),
    junk=st.binary(max_size=100)
    | st.builds(
        lambda kind, flags, step, length: HEADER.pack(MAGIC, VERSION, kind, flags, step, 0, length),
        st.integers(0, 20),
        st.integers(0, 1),
        st.integers(0, 2),
        st.integers(0, 2**40),
    ),
)
@example(tensor=60, junk=head(Kind.STATE, step=2, length=5))
def test_hosts_that_send_anything_later(
    job: Job, cluster: Cluster, tensor: int, junk: bytes
) -> None:
    """After the welcome, and after the beginning of a tensor: nothing beside its memory changes."""
    memory = bytearray(100)
    with welcomed(job, cluster.identity("m")) as sock:
        receipt = job.a.expect("m", Key(Kind.PARTIAL, 1), memoryview(memory)[20:80])
        start = head(Kind.PARTIAL, step=1, length=60) + b"t" * tensor
        with contextlib.suppress(OSError):
            sock.sendall(start + junk)
            socket.socket.shutdown(sock, socket.SHUT_WR)
        who, why = job.log.next()
        assert who == "m"
        assert "protocol" in why or "closed" in why or "another size" in why
        if receipt.done():
            assert tensor + len(junk) >= 60
        else:
            with pytest.raises((PeerClosedError, ProtocolError), match="host m"):
                receipt.wait(LIMIT)
        rest(sock)
    assert memory[:20] == memory[80:] == bytes(20)
    job.check()
    ended(why)


def test_another_version(job: Job, cluster: Cluster) -> None:
    with dial(job, cluster.identity("m").client_context()) as sock:
        frame = bytearray(message_frame(Kind.HELLO, {**HELLO, "lane": "data"}))
        frame[4] = VERSION + 1
        sock.sendall(frame)
        kind, answer = receive_message(sock, (Kind.REFUSED,), Deadline(LIMIT))
        assert kind is Kind.REFUSED
        assert answer["found"] == f"version {VERSION + 1} of the protocol"
    assert f"version {VERSION + 1}" in job.log.next()[1]
    job.check()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"node": "b"}, "host m may not take part"),
        ({"job": "other"}, "host m may not take part"),
        ({"protocol": 2}, "host m may not take part"),
        ({"port": 65536}, "a hello breaks the protocol"),
        ({"port": True}, "a hello breaks the protocol"),
        ({"lane": "side"}, "no such lane"),
        ({"facts": {**FACTS, "torch": "\x1b[2J"}}, "a hello breaks the protocol"),
    ],
)
def test_hellos_that_are_refused(
    job: Job, cluster: Cluster, change: dict[str, Any], why: str
) -> None:
    with dial(job, cluster.identity("m").client_context()) as sock:
        sock.sendall(message_frame(Kind.HELLO, {**HELLO, "lane": "data", **change}))
        _, answer = receive_message(sock, (Kind.REFUSED,), Deadline(LIMIT))
        assert answer["what"] == why
        assert "\x1b" not in job.log.next()[1]
    job.check()


def test_who_dawdles_holds_up_nobody(
    job: Job, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = [socket.create_connection(job.a.address) for _ in range(8)]
    c = cluster.transport("c")
    try:
        connect([job.a, c])
        assert job.a.peers == ("b", "c")
        c.close()
        assert job.log.next()[0] == "c"
        for sock in silent:
            sock.close()
        for _ in silent:
            assert "closed" in job.log.next()[1]
        monkeypatch.setattr(tcp, "HANDSHAKE_SECONDS", 0.2)
        with socket.create_connection(job.a.address):
            assert "a certificate and a hello within 0.2 s" in job.log.next()[1]
    finally:
        c.close()
    job.check()


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
    job.b.tell("a", {"still": "here"})
    assert job.a.hear(LIMIT).message == {"still": "here"}


def test_a_host_comes_back(job: Job, cluster: Cluster) -> None:
    job.b.close()
    assert isinstance(job.a.hear(LIMIT).error, PeerClosedError)
    job.log.next()
    job.b = cluster.transport("b")
    connect([job.a, job.b])
    job.check()


def test_a_server_connects_back(cluster: Cluster) -> None:
    """With `answer`, only the newcomers know addresses; and they may come again."""
    log = Log()
    server = TcpTransport(cluster.identity("a"), job="job", facts=FACTS, answer=True, report=log)
    with contextlib.closing(server):
        for round_ in range(2):
            b, c = cluster.transport("b"), cluster.transport("c")
            with contextlib.closing(b), contextlib.closing(c):
                for each in (b, c):
                    each.connect({"a": server.address}, LIMIT)
                    each.tell("a", {"round": round_, "from": each.node})
                    heard = server.hear(LIMIT)
                    assert heard.message == {"round": round_, "from": each.node}
                    server.tell(each.node, {"to": each.node})
                    assert each.hear(LIMIT).message == {"to": each.node}
                assert server.peers == ("b", "c")
            assert {server.hear(LIMIT).peer, server.hear(LIMIT).peer} == {"b", "c"}
            assert list(server.peers) == []
            assert {log.next()[0], log.next()[0]} == {"b", "c"}


def test_who_cannot_be_connected_back_is_dropped(cluster: Cluster) -> None:
    log = Log()
    server = TcpTransport(cluster.identity("a"), job="job", facts=FACTS, answer=True, report=log)
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
            sock.sendall(message_frame(Kind.HELLO, {**HELLO, "lane": "control", "port": port}))
            kind, answer = receive_message(sock, (Kind.WELCOME,), Deadline(LIMIT))
            assert (kind, answer["port"]) == (Kind.WELCOME, server.address[1])
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
from lockstep.net.frames import Kind
from lockstep.net.identity import Identity
from lockstep.net.stream import TlsStream
from lockstep.net.tcp import TcpTransport
from lockstep.net.stream import TlsStream
from lockstep.net.tcp import TcpTransport
from lockstep.net.transport import Key
folder, host, port, torch = sys.argv[1:]
child = TcpTransport(Identity.load(Path(folder)), job="job", facts=eval(torch))
print(*child.address, flush=True)
child.connect({"a": (host, int(port))}, 20)
memory = bytearray(8 << 20)
child.send("a", Key(Kind.STATE, 0), memoryview(memory)).wait(20)
child.tell("a", {"ready": True})
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
        assert job.a.hear(LIMIT).message == {"ready": True}
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


def test_an_open_key_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(cluster.identity("m").folder, folder)
    (folder / "node.key").chmod(0o640)
    with pytest.raises(Exception, match="is open to other users"):
        Identity.load(folder)
