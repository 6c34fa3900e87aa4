"""Joining with a token or a shared secret: what is right works, and everything else is refused."""

from __future__ import annotations

import base64
import contextlib
import socket
import ssl
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.errors import (
    NetworkError,
    PeerClosedError,
    PeerTimeoutError,
    RefusedError,
    ResourceError,
)
from lockstep.net.enrolment import (
    AuthorityShown,
    EnrolmentRequest,
    JoinServer,
    Limiter,
    join,
)
from lockstep.net.frames import HEADER, MAGIC, VERSION, Kind, head, message_frame
from lockstep.net.identity import Identity
from lockstep.net.join_tokens import Token
from lockstep.net.shared_secret import RankInvitation, SharedSecret
from tests.support.fuzzing import ended, fuzz
from tests.support.joinable_cluster import Joinable, joinable
from tests.support.tls_hosts import LIMIT, SAID, Cluster, Said, connect

__all__ = ["joinable"]  # fixtures


def enrol_frame(**fields: object) -> bytes:
    """A frame with these fields in the place of a newcomer's message."""
    body = msgspec.msgpack.encode({"op": "EnrolmentRequest", **fields})
    return head(Kind.ENROL, length=len(body)) + body


def test_a_newcomer_becomes_a_host(joinable: Joinable, tmp_path: Path) -> None:
    token = joinable.server.token()
    identity, greeting = join(token, tmp_path / "b", "b", timeout=LIMIT)
    assert joinable.why() == "it has joined" or joinable.why() == "it has joined"
    assert (identity.node, SAID.decode(greeting)) == ("b", Said(number=7))
    assert Identity.load(tmp_path / "b") == identity
    # The key has not left it, and works between hosts.
    a = joinable.cluster.transport("a")
    from lockstep.net.tcp_transport import TcpTransport
    from tests.support.tls_hosts import FACTS

    b = TcpTransport(identity, job="job", facts=FACTS)
    try:
        connect([a, b])
        assert a.peers == ("b",)
        assert b.peers == ("a",)
    finally:
        a.close()
        b.close()


def test_a_token_lets_one_in_once(joinable: Joinable, tmp_path: Path) -> None:
    token = joinable.server.token()
    join(token, tmp_path / "b", "b", timeout=LIMIT)
    with pytest.raises(RefusedError, match="the join token was refused") as caught:
        join(token, tmp_path / "c", "c", timeout=LIMIT)
    assert caught.value.found == "it was used before"
    assert not (tmp_path / "c" / "node.pem").exists()
    join(joinable.server.token(), tmp_path / "c", "c", timeout=LIMIT)  # what was left is replaced


def test_two_at_once_with_one_token(joinable: Joinable, tmp_path: Path) -> None:
    token = joinable.server.token()

    def attempt(name: str) -> str:
        try:
            return join(token, tmp_path / name, name, timeout=LIMIT)[0].node
        except RefusedError as error:
            return error.found

    with ThreadPoolExecutor(4) as pool:
        found = sorted(pool.map(attempt, ["w", "x", "y", "z"]))
    assert found[:3] == ["it was used before"] * 3
    assert found[3] in ("w", "x", "y", "z")


def test_expired_and_forged_tokens(joinable: Joinable, tmp_path: Path) -> None:
    expired = joinable.server.token(seconds=-10.0)
    forged = replace(joinable.server.token(), secret=bytes(32))
    prolonged = replace(expired, expiry=expired.expiry + 10**6)
    for token, why in (
        (expired, "it expired"),
        (forged, "it is unknown here"),
        (prolonged, "it expired"),
    ):
        with pytest.raises(RefusedError, match="the join token was refused") as caught:
            join(token, tmp_path / "b", "b", timeout=LIMIT)
        assert why in caught.value.found


def test_another_cluster_answers(joinable: Joinable, tmp_path: Path) -> None:
    """Then the secret is not sent: the token can still be used where it belongs."""
    other = Joinable(tmp_path / "other")
    with contextlib.closing(other.server):
        token = joinable.server.token()
        host, port = other.server.address
        with pytest.raises(RefusedError, match="is not of the cluster that the token is for"):
            join(replace(token, host=host, port=port), tmp_path / "b", "b", timeout=LIMIT)
        assert other.reports.empty()  # it was only looked at
    join(token, tmp_path / "b", "b", timeout=LIMIT)


def padded_cluster(folder: Path) -> Joinable:
    """A cluster whose CA's certificate ends with padding in PEM, as two of three do."""
    for number in range(100):
        made = Joinable(folder / str(number))
        if len(ssl.PEM_cert_to_DER_cert(made.cluster.authority.certificate)) % 3:
            return made
        made.server.close()
    raise AssertionError("no certificate has another length")


def test_another_cluster_answers_with_both_authorities(tmp_path: Path) -> None:
    """Only the certificate that the token speaks of counts, whatever is sent behind it."""
    ours, other = padded_cluster(tmp_path / "ours"), Joinable(tmp_path / "other")
    with contextlib.closing(ours.server), contextlib.closing(other.server):
        both = ours.cluster.authority.certificate + other.cluster.authority.certificate
        other.server._shown = AuthorityShown(authority=both)
        token, (host, port) = ours.server.token(), other.server.address
        with pytest.raises(RefusedError, match="is not accepted"):
            join(replace(token, host=host, port=port), tmp_path / "b", "b", timeout=LIMIT)
        join(token, tmp_path / "b", "b", timeout=LIMIT)


def invited(server: JoinServer, shared: SharedSecret, rank: int = 1) -> RankInvitation:
    host, port = server.address
    return RankInvitation(shared=shared, rank=rank, host=host, port=port, node="a")


def test_a_shared_secret_lets_each_rank_in_once(joinable: Joinable, tmp_path: Path) -> None:
    shared = SharedSecret(secret=bytes(32), job="job 7")
    proof = shared.proof(joinable.cluster.authority.certificate)
    with contextlib.closing(joinable.serve(proof=proof)) as server:
        for rank in (1, 2):
            server.admit(shared.of_rank(rank), seconds=LIMIT)
        for rank in (1, 2):
            invitation = invited(server, shared, rank)
            identity, _ = join(invitation, tmp_path / str(rank), f"rank-{rank}", timeout=LIMIT)
            assert identity.node == f"rank-{rank}"
        with pytest.raises(RefusedError, match="the join token was refused") as caught:
            join(invited(server, shared), tmp_path / "again", "again", timeout=LIMIT)
        assert caught.value.found == "it was used before"
        with pytest.raises(RefusedError, match="the join token was refused") as caught:
            join(invited(server, shared, 3), tmp_path / "3", "rank-3", timeout=LIMIT)
        assert caught.value.found == "it is unknown here"


@pytest.mark.parametrize(
    "other",
    [
        SharedSecret(secret=bytes(31) + b"\1", job="job 7"),
        SharedSecret(secret=bytes(32), job="job 8"),
    ],
)
def test_who_lacks_the_shared_secret_is_told_nothing(
    joinable: Joinable, tmp_path: Path, other: SharedSecret
) -> None:
    """A CA without a proof, and one with a proof that is wrong, or is for another CA."""
    shared = SharedSecret(secret=bytes(32), job="job 7")
    certificate = joinable.cluster.authority.certificate
    foreign = Cluster(tmp_path / "foreign").authority.certificate
    for proof in ("", "\u2028", other.proof(certificate), shared.proof(foreign)):
        with contextlib.closing(joinable.serve(proof=proof)) as server:
            server.admit(shared.of_rank(1), seconds=LIMIT)
            with pytest.raises(RefusedError, match="does not prove that it has the shared secret"):
                join(invited(server, shared), tmp_path / "b", "b", timeout=LIMIT)
            assert joinable.reports.empty()


def test_another_host_of_the_cluster_answers(joinable: Joinable, tmp_path: Path) -> None:
    token = replace(joinable.server.token(), node="z")
    with pytest.raises(RefusedError, match="another host answers"):
        join(token, tmp_path / "b", "b", timeout=LIMIT)


@fuzz(100)
@given(junk=st.binary(max_size=200))
def test_strangers_that_send_anything(joinable: Joinable, junk: bytes) -> None:
    with socket.create_connection(joinable.server.address) as sock:
        with contextlib.suppress(OSError):  # it may be refused after the first bytes
            sock.sendall(junk)
            sock.shutdown(socket.SHUT_WR)
        why = joinable.why()
        assert "TLS" in why or "closed" in why
    ended(why)


@fuzz(100)
@given(
    junk=st.binary(max_size=200)
    | st.builds(
        lambda kind, length, body: HEADER.pack(MAGIC, VERSION, kind, 0, 0, 0, length) + body,
        st.just(Kind.ENROL) | st.integers(0, 20),
        st.integers(0, 50) | st.integers(0, 2**64 - 1),
        st.binary(max_size=50),
    )
    | st.builds(
        lambda secret, request: enrol_frame(secret=secret, request=request),
        st.text(max_size=60) | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=300),
        st.binary(max_size=100) | st.text(max_size=100) | st.none(),
    )
)
def test_newcomers_that_send_anything(joinable: Joinable, junk: bytes) -> None:
    with joinable.dial() as sock:
        with contextlib.suppress(OSError):
            sock.sendall(junk)
            socket.socket.shutdown(sock, socket.SHUT_WR)
        why = joinable.why()
        assert "protocol" in why or "closed" in why or "token was refused" in why
    assert len(list((joinable.cluster.folder / "authority/issued").iterdir())) == 1
    ended(why)


@fuzz(100)
@given(change=st.integers(1, 255), place=st.integers(0, 31), length=st.integers(0, 40))
def test_guessed_secrets(joinable: Joinable, change: int, place: int, length: int) -> None:
    """Next to a right one, cut or prolonged. None is in the log, and the right one still works."""
    token = joinable.server.token()
    altered = bytearray(token.secret)
    altered[place] ^= change
    for secret in (bytes(altered), (token.secret + bytes(8))[:length]):
        if secret != token.secret:
            assert joinable.refused(secret, b"").found == "it is unknown here"
            why = joinable.why()
            assert "token was refused" in why
            assert base64.b64encode(secret).decode() not in why or not secret
            ended(why)
    assert joinable.refused(token.secret, b"").what == "the certificate request was refused"
    joinable.why()


@fuzz(60)
@given(
    way=st.sampled_from(["used", "expired", "cut"]),
    age=st.integers(1, 10**6),
    cut=st.integers(0, 100),
)
def test_tokens_that_come_too_late(joinable: Joinable, way: str, age: int, cut: int) -> None:
    """Replayed or expired ones are refused; what was cut on its way has not used one up."""
    token = joinable.server.token(seconds=-age if way == "expired" else LIMIT)
    wanted = {"used": "it was used before", "expired": "it expired", "cut": "closed"}[way]
    if way == "used":
        joinable.refused(token.secret, b"")
        joinable.why()
    if way == "cut":
        said = EnrolmentRequest(secret=token.secret, request=b"")
        with joinable.dial() as sock:
            sock.sendall(message_frame(Kind.ENROL, said)[:-1][: cut or None])
    else:
        assert wanted in joinable.refused(token.secret, b"").found
    why = joinable.why()
    assert wanted in why
    if way == "cut":
        assert joinable.refused(token.secret, b"").what == "the certificate request was refused"
        joinable.why()
    ended(why)


def test_answers_that_are_no_joining(joinable: Joinable, tmp_path: Path) -> None:
    """The newcomer's side, against a server that is something else."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        token = replace(joinable.server.token(), host=host, port=port)

        def answer(content: bytes) -> None:
            sock, _ = server.accept()
            with sock:
                sock.settimeout(LIMIT)
                sock.recv(100)
                sock.sendall(content)

        for content in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b""):
            thread = threading.Thread(target=answer, args=(content,))
            thread.start()
            with pytest.raises(NetworkError, match=r"(closed the connection|does not speak TLS)"):
                join(token, tmp_path / "b", "b", timeout=LIMIT)
            thread.join()
        with pytest.raises(PeerTimeoutError, match="did not answer in time"):
            join(token, tmp_path / "b", "b", timeout=0.2)
    with pytest.raises(PeerClosedError, match="closed the connection"):
        join(token, tmp_path / "b", "b", timeout=LIMIT)


def test_who_dawdles_holds_up_nobody_and_is_ended(joinable: Joinable, tmp_path: Path) -> None:
    silent = [socket.create_connection(joinable.server.address) for _ in range(8)]
    slow = joinable.dial()
    slow.sendall(message_frame(Kind.ENROL, Said())[:5])
    join(joinable.server.token(), tmp_path / "b", "b", timeout=LIMIT)
    for sock in (*silent, slow):
        sock.close()
    server = joinable.serve(seconds=0.2)
    with contextlib.closing(server), socket.create_connection(server.address):
        while "within 0.2 s" not in joinable.why():
            pass


def test_closing_ends_those_who_dawdle(joinable: Joinable) -> None:
    server = joinable.serve(seconds=600.0)
    with socket.create_connection(server.address), joinable.dial(server):
        began = time.monotonic()
        server.close()
        assert time.monotonic() - began < LIMIT


def test_too_many_attempts(joinable: Joinable) -> None:
    server = joinable.serve(limiter=Limiter(burst=2, seconds=3600.0))
    with contextlib.closing(server):
        for _ in range(4):
            with (
                contextlib.suppress(ConnectionError),
                socket.create_connection(server.address) as sock,
            ):
                sock.settimeout(LIMIT)
                sock.sendall(b"this is no TLS")
                while sock.recv(100):
                    pass
        reasons = [joinable.why() for _ in range(4)]
        assert reasons.count("it tries to join too often") == 2


def test_no_secret_in_a_report(joinable: Joinable, tmp_path: Path) -> None:
    token = joinable.server.token()
    join(token, tmp_path / "b", "b", timeout=LIMIT)
    with pytest.raises(RefusedError):
        join(token, tmp_path / "c", "c", timeout=LIMIT)
    reasons = joinable.why() + joinable.why()
    assert "it was used before" in reasons
    for form in (token.secret.hex(), base64.b64encode(token.secret).decode(), token.text()):
        assert form not in reasons


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = Token(
        host="127.0.0.1", port=1, node="a", fingerprint=bytes(32), secret=bytes(32), expiry=0
    )
    monkeypatch.delitem(sys.modules, "lockstep.net.certificate_authority")
    monkeypatch.delattr(sys.modules["lockstep.net"], "certificate_authority", raising=False)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ResourceError, match="need the package cryptography") as caught:
        join(token, tmp_path / "b", "b", timeout=LIMIT)
    assert caught.value.fix == "pip install 'lockstep-dlp[net]'"
