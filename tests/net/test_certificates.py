"""Certificates: roles, renewal and revocation."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509

from lockstep.errors import IdentityError, RefusedError
from lockstep.net import certificate_authority
from lockstep.net.certificate_authority import Authority, make_request, renew, renewal_request
from lockstep.net.certificates import EVERY_ROLE, SKEW_SECONDS, Role, host_certificate
from lockstep.net.enrolment import JoinServer, join
from lockstep.net.identity import Identity, PeerIdentity
from lockstep.net.revocation_list import REVOKED, RevocationList
from lockstep.net.tcp_transport import TcpTransport
from tests.support.harmed_runs import until
from tests.support.joinable_cluster import mode
from tests.support.tls_hosts import LIMIT, SAID, Cluster, Said, connect

HEAD, HOST = frozenset({Role.HEAD}), frozenset({Role.HOST})


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path / "cluster")


def transport(identity: Identity, roles: frozenset[Role] = EVERY_ROLE) -> TcpTransport:
    return TcpTransport(identity, job="job", facts={}, codec=SAID, roles=roles, silence=2.0)


def test_what_a_certificate_says(cluster: Cluster) -> None:
    now = 1_700_000_000.0
    found = cluster.identity("a", role=Role.HEAD, seconds=60.0, now=now).certificate()
    assert (found.node, found.role, found.since, found.until) == ("a", Role.HEAD, now, now + 60.0)
    assert not found.is_due(now + 19.0)
    assert found.is_due(now + 21.0)
    assert replace(found, role=None).is_due(now)
    days = cluster.authority.enrol(cluster.folder / "b", "b").certificate()
    assert (days.role, days.until - days.since) == (Role.HOST, 86400.0)
    assert SKEW_SECONDS == 300.0


@pytest.mark.parametrize(
    ("accepting", "connecting", "refuses"),
    [(HEAD, EVERY_ROLE, "host b may not act as head"), (HOST, HEAD, "host a may not act as head")],
)
def test_who_acts_as_what_it_is_not(
    cluster: Cluster, accepting: frozenset[Role], connecting: frozenset[Role], refuses: str
) -> None:
    """Whether it answers or connects."""
    a = transport(cluster.identity("a"), accepting)
    b = transport(cluster.identity("b"), connecting)
    with contextlib.closing(a), contextlib.closing(b):
        with pytest.raises(RefusedError, match=refuses):
            b.connect({"a": a.address}, LIMIT)
        assert a.peers == b.peers == ()


def test_a_host_cannot_enrol_others(cluster: Cluster, tmp_path: Path) -> None:
    """Even where it has a token, and signs with what it has."""
    server = JoinServer(cluster.identity("b"), Authority.open(tmp_path / "own").sign)
    with (
        contextlib.closing(server),
        pytest.raises(RefusedError, match="host b may not act as head"),
    ):
        join(server.token(), tmp_path / "c", "c", timeout=LIMIT)


def test_a_role_is_given_not_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    key = certificate_authority._load_key(cluster.identity("b").folder / "node.key")
    subject = certificate_authority._name("b", Role.HEAD)
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    signed = cluster.authority.sign(certificate_authority._signed(builder, key), renews="b")
    assert host_certificate(signed).role is Role.HOST


def test_certificates_of_older_versions(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    name = certificate_authority._name
    with monkeypatch.context() as patched:
        patched.setattr(certificate_authority, "_name", lambda of, role=None: name(of))
        old = cluster.identity("old")
    (cluster.folder / "authority" / "issued" / "old").write_bytes(b"")  # as the book was then
    assert old.certificate().role is None
    a, b = transport(cluster.identity("a")), transport(old)
    refused = pytest.raises(RefusedError, match="the certificate of host old has no role")
    with contextlib.closing(a), contextlib.closing(b), refused:
        b.connect({"a": a.address}, LIMIT)
    renew(old.folder, cluster.authority.sign(renewal_request(old.folder)))
    assert old.certificate().role is Role.HOST
    # `up` replaces its own, whatever it is.
    assert cluster.authority.enrol(old.folder, "old", role=Role.HEAD) == old
    assert old.certificate().role is Role.HEAD


def test_what_is_renewed(cluster: Cluster, tmp_path: Path) -> None:
    """The same name and the same key."""
    b, sign = cluster.identity("b"), cluster.authority.sign
    before = b.certificate()
    request = renewal_request(b.folder)
    for theirs, name in (
        (request, "c"),
        (make_request(tmp_path / "other", "b"), "b"),
        (make_request(tmp_path / "new", "new"), "new"),
    ):
        with pytest.raises(RefusedError, match="renewed for the same name and key alone"):
            sign(theirs, renews=name)
    with pytest.raises(IdentityError, match="does not fit"):
        renew(b.folder, (cluster.identity("c").folder / "node.pem").read_bytes())
    assert b.certificate() == before
    renew(b.folder, sign(request, renews="b"))
    after = b.certificate()
    assert (after.node, after.role) == (before.node, before.role)
    assert after.serial != before.serial
    assert {path.name for path in b.folder.iterdir()} == {"node.key", "node.pem", "authority.pem"}
    assert all(mode(path) == 0o600 for path in b.folder.iterdir())


def test_connections_outlive_their_certificates(cluster: Cluster) -> None:
    """New ones are by the renewed one, without a restart of anybody."""
    born = time.time()
    short = [cluster.identity(name, seconds=4.0, now=born) for name in ("a", "b")]
    a, b = (transport(identity) for identity in short)
    c = transport(cluster.identity("c"))
    with contextlib.closing(a), contextlib.closing(b), contextlib.closing(c):
        connect([a, b])
        time.sleep(max(0.0, born + 4.2 - time.time()))
        b.tell("a", Said(number=1))
        assert a.hear(LIMIT).message == Said(number=1)
        with pytest.raises(RefusedError, match="certificate"):
            c.connect({"a": a.address}, LIMIT)
        for identity in short:
            signed = cluster.authority.sign(renewal_request(identity.folder), renews=identity.node)
            renew(identity.folder, signed)
        connect([a, c])
        connect([b, c])
        b.tell("a", Said(number=2))
        assert a.hear(LIMIT).message == Said(number=2)


def test_a_host_that_is_removed(cluster: Cluster, tmp_path: Path) -> None:
    """Its connections end, and it is refused from then on; the others go on."""
    a, b, c = (transport(cluster.identity(name)) for name in ("a", "b", "c"))
    revoked = RevocationList(cluster.identity("a").folder)
    with contextlib.closing(a), contextlib.closing(b), contextlib.closing(c):
        connect([a, b, c])
        cluster.authority.revoke("b", revoked)
        heard = a.hear(LIMIT)  # whoever hears looks at the list
        assert heard.peer == "b"
        assert "host b was removed from the cluster" in str(heard.error)
        until(lambda: b.peers == ("c",), LIMIT, "that b has heard of it")
        c.tell("a", Said(number=3))
        assert a.hear(LIMIT).message == Said(number=3)
        with pytest.raises(RefusedError, match="host b was removed from the cluster"):
            b.connect({"a": a.address}, LIMIT)
        with pytest.raises(RefusedError, match="host b was removed from the cluster"):
            a.connect({"b": b.address}, LIMIT)
        assert a.peers == ("c",)
    assert mode(cluster.identity("a").folder / REVOKED) == 0o600
    again = transport(cluster.identity("a"))
    late = transport(cluster.identity("b"))
    refused = pytest.raises(RefusedError, match="host b was removed from the cluster")
    with contextlib.closing(again), contextlib.closing(late), refused:
        late.connect({"a": again.address}, LIMIT)
    # The name is free for a host with another key, whose certificate is another one.
    assert cluster.authority.sign(make_request(tmp_path / "new", "b"))


def test_every_certificate_of_a_host_is_revoked(cluster: Cluster) -> None:
    """Also those that were renewed, and are valid still."""
    b = cluster.identity("b")
    found = [b.certificate().serial]
    for _ in range(2):
        signed = cluster.authority.sign(renewal_request(b.folder), renews="b")
        found.append(host_certificate(signed).serial)
    revoked = RevocationList(cluster.identity("a").folder)
    cluster.authority.revoke("b", revoked)
    assert set(revoked.serials) == set(found)
    assert cluster.authority.names == ["a"]
    with pytest.raises(RefusedError, match="renewed for the same name and key alone"):
        cluster.authority.sign(renewal_request(b.folder), renews="b")


def test_the_list_of_revoked_certificates(tmp_path: Path) -> None:
    revoked, other = RevocationList(tmp_path), RevocationList(tmp_path)
    assert revoked.serials == {}
    assert not other.has_changed()
    revoked.add({"a1": 1000.0, "b2": 5000.0}, now=900.0)
    assert other.has_changed()
    assert not other.has_changed()
    assert other.serials == {"a1": 1000.0, "b2": 5000.0}
    revoked.add({"c3": 9000.0}, now=2000.0)
    assert other.serials == {"b2": 5000.0, "c3": 9000.0}, "what has expired is refused anyway"
    with pytest.raises(RefusedError, match="host x was removed"):
        other.check(PeerIdentity(node="x", role=Role.HOST, serial="c3"))
    other.check(PeerIdentity(node="x", role=Role.HOST, serial="c4"))
    (tmp_path / REVOKED).write_bytes(b"[1")
    os.utime(tmp_path / REVOKED, (1.0, 1.0))
    with pytest.raises(IdentityError, match="cannot be read"):
        other.check(PeerIdentity(node="x", role=Role.HOST, serial="c4"))


def test_a_list_that_cannot_be_read(cluster: Cluster) -> None:
    """Then nobody is let in, which is said; those who are there stay, and no thread ends."""
    reports: list[str] = []
    a = TcpTransport(
        cluster.identity("a"), job="job", facts={}, codec=SAID,
        report=lambda who, why: reports.append(why),
    )  # fmt: skip
    b, c = transport(cluster.identity("b")), transport(cluster.identity("c"))
    with contextlib.closing(a), contextlib.closing(b), contextlib.closing(c):
        connect([a, b])
        (cluster.identity("a").folder / REVOKED).write_bytes(b"[1")
        b.tell("a", Said(number=1))
        assert a.hear(LIMIT).message == Said(number=1)
        assert any("the list of revoked certificates" in why for why in reports)
        with pytest.raises(RefusedError, match="the list of revoked certificates"):
            c.connect({"a": a.address}, LIMIT)
        assert a.peers == ("b",)
