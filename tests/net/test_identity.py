"""Keys, certificates and names: what is right works, and everything else is refused."""

from __future__ import annotations

import base64
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from lockstep.errors import (
    IdentityError,
    RefusedError,
)
from lockstep.net.certificate_authority import Authority, make_request, store
from lockstep.net.certificates import check_name, fingerprint
from lockstep.net.enrolment import join
from lockstep.net.identity import Identity
from lockstep.net.shared_secret import make_secret, read_secret
from tests.support.joinable_cluster import Joinable, joinable, mode
from tests.support.tls_hosts import LIMIT, Cluster

__all__ = ["joinable"]  # fixtures


def test_files_are_private(joinable: Joinable, tmp_path: Path) -> None:
    folder = tmp_path / "state" / "node"
    join(joinable.server.token(), folder, "b", timeout=LIMIT)
    root = joinable.cluster.folder
    for each in (folder, root / "authority", root / "authority" / "issued", root / "a"):
        assert mode(each) == 0o700, each
    files = [*folder.iterdir(), *(root / "authority").rglob("*")]
    for file in files:
        assert file.is_dir() or mode(file) == 0o600, file
    assert {file.name for file in files} >= {"node.key", "node.pem", "authority.key", "b"}


def test_secret_files(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    make_secret(path)
    assert mode(path) == 0o600
    assert len(read_secret(path)) == 64
    with pytest.raises(IdentityError, match="cannot be written"):
        make_secret(path)
    path.chmod(0o640)
    with pytest.raises(IdentityError, match="is open to other users"):
        read_secret(path)
    path.chmod(0o600)
    path.write_bytes(b"short\n")
    with pytest.raises(IdentityError, match="too short"):
        read_secret(path)
    with pytest.raises(IdentityError, match="cannot be read"):
        read_secret(tmp_path / "none")


def test_names(joinable: Joinable, tmp_path: Path) -> None:
    for name in ("a" * 63, "node-1.example_x", "7"):
        assert check_name(name) == name
    for name in ("", "A", "-a", "a-", "a" * 64, "a/b", "../a", "a b", "ä", "a\n"):
        with pytest.raises(IdentityError, match="not a name for a host"):
            check_name(name)
    join(joinable.server.token(), tmp_path / "b", "b", timeout=LIMIT)
    with pytest.raises(RefusedError, match="the name b has a certificate already"):
        join(joinable.server.token(), tmp_path / "b2", "b", timeout=LIMIT)
    with pytest.raises(IdentityError, match="holds an identity already"):
        join(joinable.server.token(), tmp_path / "b", "c", timeout=LIMIT)


def name_of(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


def request_of(subject: x509.Name, key: Key) -> bytes:
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM)


def of_path(key: ec.EllipticCurvePrivateKey) -> bytes:
    return request_of(name_of("../../etc"), key)


def of_nobody(key: ec.EllipticCurvePrivateKey) -> bytes:
    return request_of(x509.Name([]), key)


def of_two(key: ec.EllipticCurvePrivateKey) -> bytes:
    return request_of(x509.Name([*name_of("x"), *name_of("y")]), key)


def of_another_curve(key: ec.EllipticCurvePrivateKey) -> bytes:
    return request_of(name_of("x"), ec.generate_private_key(ec.SECP384R1()))


def of_another_kind(key: ec.EllipticCurvePrivateKey) -> bytes:
    return request_of(name_of("x"), ed25519.Ed25519PrivateKey.generate())


def of_another_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Somebody else's public key, with a signature of ours."""
    lines = request_of(name_of("x"), key).decode().splitlines()
    raw = bytearray(base64.b64decode("".join(lines[1:-1])))
    raw[-5] ^= 1
    body = base64.b64encode(raw).decode()
    return f"{lines[0]}\n{body}\n{lines[-1]}\n".encode()


def of_nothing(key: ec.EllipticCurvePrivateKey) -> bytes:
    return b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"


@pytest.mark.parametrize(
    "make",
    [of_path, of_nobody, of_two, of_another_curve, of_another_kind, of_another_key, of_nothing],
)
def test_requests_that_are_not_signed(
    joinable: Joinable, make: Callable[[ec.EllipticCurvePrivateKey], bytes]
) -> None:
    request = make(ec.generate_private_key(ec.SECP256R1()))
    assert (
        joinable.refused(joinable.server.token().secret, request).what
        == "the certificate request was refused"
    )
    assert "the certificate request was refused" in joinable.why()
    assert {each.name for each in (joinable.cluster.folder / "authority/issued").iterdir()} == {"a"}


def test_one_authority_is_made(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: Authority.open(tmp_path / "state" / "ca"), range(4)))
    assert len({fingerprint(each.certificate) for each in made}) == 1
    assert [each.name for each in (tmp_path / "state").iterdir()] == ["ca"]


def test_identities_that_cannot_be_used(tmp_path: Path) -> None:
    cluster, other = Cluster(tmp_path / "one"), Cluster(tmp_path / "two")
    folder = cluster.identity("b").folder
    assert cluster.authority.enrol(folder, "b") == cluster.identity("b")
    with pytest.raises(IdentityError, match="holds no identity"):
        Identity.load(tmp_path / "nothing")
    with pytest.raises(IdentityError, match="holds no CA"):
        Authority(tmp_path)
    request = make_request(tmp_path / "c", "c")
    signed = other.authority.sign(request)
    with pytest.raises(IdentityError, match="the new certificate does not fit"):
        store(tmp_path / "c", signed, cluster.authority.certificate)
    make_request(tmp_path / "c", "c")  # another key
    with pytest.raises(IdentityError, match="the new certificate does not fit") as caught:
        store(tmp_path / "c", signed, other.authority.certificate)
    assert caught.value.found == "it is for another key"
    (folder / "node.key").write_bytes((other.identity("b").folder / "node.key").read_bytes())
    with pytest.raises(IdentityError, match="cannot be used"):
        Identity.load(folder).server_context()
    (cluster.folder / "authority" / "authority.key").write_text("nonsense")
    with pytest.raises(IdentityError, match="cannot be read"):
        Authority(cluster.folder / "authority")
    (cluster.folder / "authority" / "authority.key").chmod(0o644)
    with pytest.raises(IdentityError, match="is open to other users"):
        Authority(cluster.folder / "authority")
