"""The transport between hosts against those that it must not trust."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lockstep.errors import PeerClosedError, ProtocolError, RefusedError
from lockstep.net import tcp_transport as tcp
from lockstep.net.frames import HEADER, MAGIC, VERSION, Kind, head
from lockstep.net.handshake import REFUSAL
from lockstep.net.identity import Identity
from lockstep.net.sockets import receive_message
from lockstep.net.tls_stream import Deadline
from lockstep.net.transport import Key
from tests.support.fuzzing import ended, fuzz
from tests.support.tls_hosts import FACTS, LIMIT, Cluster, connect
from tests.support.tls_peers import HELLO, Job, cluster, dial, hello_frame, job, rest, welcomed

__all__ = ["cluster", "job"]  # fixtures


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Another cluster, with a CA of its own."""
    return Cluster(Path(tmp_path_factory.mktemp("strangers")))


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
@given(client=st.sampled_from(list(WRONG)), said=st.just(hello_frame(**HELLO)) | JUNK)
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
        lambda cut, extra: hello_frame(**HELLO, stream="data")[:cut] + extra,
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
        frame = bytearray(hello_frame(**HELLO, stream="data"))
        frame[4] = VERSION + 1
        sock.sendall(frame)
        kind, answer = receive_message(sock, {Kind.REFUSED: REFUSAL}, Deadline(LIMIT))
        assert kind is Kind.REFUSED
        assert answer.error.found == f"version {VERSION + 1} of the protocol"
    assert f"version {VERSION + 1}" in job.log.next()[1]
    job.check()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"node": "b"}, "host m may not take part"),
        ({"job": "other"}, "host m may not take part"),
        ({"protocol": 1}, "host m may not take part"),
        ({"port": 65536}, "a hello breaks the protocol"),
        ({"port": True}, "a hello breaks the protocol"),
        ({"stream": "side"}, "a hello breaks the protocol"),
        ({"stream": ""}, "host m does not say what its connection is for"),
        ({"more": 1}, "a hello breaks the protocol"),
        ({"facts": {**FACTS, "torch": "\x1b[2J"}}, "a hello breaks the protocol"),
    ],
)
def test_hellos_that_are_refused(
    job: Job, cluster: Cluster, change: dict[str, Any], why: str
) -> None:
    with dial(job, cluster.identity("m").client_context()) as sock:
        sock.sendall(hello_frame(**{**HELLO, "stream": "data", **change}))
        _, answer = receive_message(sock, {Kind.REFUSED: REFUSAL}, Deadline(LIMIT))
        assert answer.error.what == why
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
        assert job.a.hear(LIMIT).peer == "c"
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


def test_an_open_key_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(cluster.identity("m").folder, folder)
    (folder / "node.key").chmod(0o640)
    with pytest.raises(Exception, match="is open to other users"):
        Identity.load(folder)
