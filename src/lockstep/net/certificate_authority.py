"""The cluster's CA: keys are made, certificates signed. Made on first use.

    STATE/authority/authority.key  the CA's private key                      mode 0600
    STATE/authority/authority.pem  its certificate
    STATE/authority/issued/NAME    what each name has been given (see `issued_certificates`)

It lives on the host that hands out tokens. Keys are on the curve P-256. This is what needs
the package `cryptography`, and so the extra `net`.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import secrets
import shutil
import tempfile
import threading
import time
from pathlib import Path

from lockstep.errors import IdentityError, RefusedError
from lockstep.net.certificates import (
    NODE_SECONDS,
    SKEW_SECONDS,
    Role,
    check_name,
    common_name,
    load_certificate,
    missing_cryptography,
)
from lockstep.net.identity import (
    AUTHORITY,
    CERTIFICATE,
    KEY,
    Identity,
    check_private,
    private_folder,
)
from lockstep.net.issued_certificates import IssuedCertificates
from lockstep.net.revocation_list import RevocationList
from lockstep.system.private_files import replace_private, write_private

try:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError as error:
    raise missing_cryptography() from error

AUTHORITY_KEY = "authority.key"
AUTHORITY_SECONDS = 10 * 365 * 86400.0
"""For how long the CA's certificate is valid."""


class Authority:
    """A CA that is on disk. Its methods may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        """Load it.

        Raises:
            IdentityError: files are missing or unusable, or the key is open to other users.
        """
        for name in (AUTHORITY_KEY, AUTHORITY):
            if not (folder / name).is_file():
                raise IdentityError(
                    f"{folder} holds no CA",
                    expected=f"{AUTHORITY_KEY} and {AUTHORITY}",
                    found=f"no {name}",
                    fix="move the folder away to get a new CA; every host has to join again",
                )
        check_private(folder / AUTHORITY_KEY)
        self.folder = folder
        self.certificate = (folder / AUTHORITY).read_text()
        """In PEM."""
        self._key = _load_key(folder / AUTHORITY_KEY)
        self._certificate = load_certificate(self.certificate.encode())
        self._issued = IssuedCertificates(folder / "issued")
        self._lock = threading.Lock()

    @staticmethod
    def open(folder: Path) -> Authority:
        """The CA in a folder; a new one if there is no such folder.

        Raises:
            IdentityError: as above.
        """
        if not folder.exists():
            private_folder(folder.parent)
            unfinished = Path(tempfile.mkdtemp(prefix=".authority-", dir=folder.parent))
            try:
                _make_authority(unfinished)
                os.rename(unfinished, folder)
            except OSError:
                shutil.rmtree(unfinished)
                if not folder.exists():  # else somebody else has just made one
                    raise
        return Authority(folder)

    def sign(
        self,
        request: bytes,
        *,
        role: Role = Role.HOST,
        seconds: float = NODE_SECONDS,
        now: float | None = None,
        renews: str | None = None,
    ) -> bytes:
        """A certificate (PEM) for a request (PEM), valid for so long from `now` (s since 1970).

        `renews`: the name of the host that wants it, as its certificate has it. It gets one of
        that name only, for the key that it has shown at first.

        Raises:
            RefusedError: the request is unusable, or its name is another host's.
        """
        asked = _load_request(request)
        name, key = common_name(asked.subject), _key_fingerprint(asked.public_key())
        now = time.time() if now is None else now
        serial = x509.random_serial_number()
        builder = _node_certificate(asked, self._certificate, self._key.public_key(), role, serial)
        signed = _signed(
            builder.not_valid_before(_moment(now - SKEW_SECONDS)).not_valid_after(
                _moment(now + seconds)
            ),
            self._key,
        )
        with self._lock:
            entry = self._issued.entry(name)
            if renews is not None and (name != renews or entry is None or entry.key != key):
                raise RefusedError(
                    "a certificate is renewed for the same name and key alone",
                    expected=f"a request of host {renews}, for the key that it has",
                    found=f"one for {name}",
                )
            self._issued.check(name, key)
            self._issued.record(name, key, f"{serial:x}", now + seconds, now)
        return signed

    def enrol(
        self, folder: Path, name: str, *, role: Role = Role.HOST, seconds: float = NODE_SECONDS
    ) -> Identity:
        """The identity in `folder`, for this host itself; made if there is none, and renewed if
        that is due.

        Raises:
            RefusedError: another host has the name.
        """
        if not (folder / CERTIFICATE).exists():
            request = make_request(folder, name)
            signed = self.sign(request, role=role, seconds=seconds)
            store(folder, signed, self.certificate)
            return Identity.load(folder)
        identity = Identity.load(folder)
        known = identity.certificate()
        if known.is_due(time.time()) or known.role is not role:
            renew(folder, self.sign(renewal_request(folder), role=role, seconds=seconds))
        return identity

    @property
    def names(self) -> list[str]:
        """The names that hosts have, this one's among them."""
        with self._lock:
            return self._issued.names

    def revoke(self, name: str, revoked: RevocationList) -> None:
        """Put a host's certificates into a list of those that are refused, and free its name."""
        with self._lock:
            entry = self._issued.entry(name)
            if entry is not None:
                revoked.add(entry.serials)
                self._issued.forget(name)


def make_request(folder: Path, name: str) -> bytes:
    """Make a private key in `folder` and a request (PEM) for a certificate with this name.

    A key that an earlier attempt left is replaced, but none that has a certificate.

    Raises:
        IdentityError: the name is not allowed, or there is an identity already.
    """
    check_name(name)
    if (folder / CERTIFICATE).exists():
        raise IdentityError(
            f"{folder} holds an identity already",
            expected="a folder without one",
            found=CERTIFICATE,
            fix="use that identity, or remove the folder",
        )
    key = ec.generate_private_key(ec.SECP256R1())
    private_folder(folder)
    (folder / KEY).unlink(missing_ok=True)
    write_private(folder / KEY, _key_bytes(key))
    return _request(name, key)


def renewal_request(folder: Path) -> bytes:
    """A request (PEM) for another certificate of the identity in `folder`: its name and its key.

    Raises:
        IdentityError: there is none that can be used.
    """
    return _request(Identity.load(folder).node, _load_key(folder / KEY))


def store(folder: Path, certificate: bytes, authority: str) -> None:
    """Complete an identity whose key is in `folder`, after checking that all of it fits.

    Raises:
        IdentityError: the certificate is not for that key, or not of that CA.
    """
    _check_fits(folder, certificate, authority)
    (folder / AUTHORITY).unlink(missing_ok=True)
    write_private(folder / AUTHORITY, authority.encode())
    write_private(folder / CERTIFICATE, certificate)


def renew(folder: Path, certificate: bytes) -> None:
    """Put another certificate into an identity, in one go, after checking that it fits.

    Raises:
        IdentityError: it is not for that key and name, or not of that CA.
    """
    identity = Identity.load(folder)
    _check_fits(folder, certificate, (folder / AUTHORITY).read_text())
    name = common_name(load_certificate(certificate).subject)
    if name != identity.node:
        raise IdentityError("the new certificate is another's", expected=identity.node, found=name)
    replace_private(folder / CERTIFICATE, certificate)


def _check_fits(folder: Path, certificate: bytes, authority: str) -> None:
    issued, ca = load_certificate(certificate), load_certificate(authority.encode())
    try:
        issued.verify_directly_issued_by(ca)
        if issued.public_key() != _load_key(folder / KEY).public_key():
            raise ValueError("it is for another key")
    except (ValueError, TypeError, InvalidSignature) as error:
        raise IdentityError(
            "the new certificate does not fit",
            expected="one for this host's key, signed by the cluster's CA",
            found=str(error) or type(error).__name__,
        ) from error


def _make_authority(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"lockstep-authority-{secrets.token_hex(4)}")
    subject_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    now = time.time()
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_moment(now - SKEW_SECONDS))
        .not_valid_after(_moment(now + AUTHORITY_SECONDS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(subject_id, critical=False)
    )
    write_private(folder / AUTHORITY_KEY, _key_bytes(key))
    write_private(folder / AUTHORITY, _signed(builder, key))


def _node_certificate(
    request: x509.CertificateSigningRequest,
    issuer: x509.Certificate,
    issuer_key: ec.EllipticCurvePublicKey,
    role: Role,
    serial: int,
) -> x509.CertificateBuilder:
    """All but its time. Of the request only the key and the name are taken over."""
    subject_id = x509.SubjectKeyIdentifier.from_public_key(request.public_key())
    authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key)
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    name = common_name(request.subject)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name, role))
        .issuer_name(issuer.subject)
        .public_key(request.public_key())
        .serial_number(serial)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(subject_id, critical=False)
        .add_extension(authority_id, critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _load_request(request: bytes) -> x509.CertificateSigningRequest:
    try:
        asked = x509.load_pem_x509_csr(request)
        key = asked.public_key()
        if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
            raise ValueError("another kind of key than P-256")
        if not asked.is_signature_valid:
            raise ValueError("a signature of another key")
        common_name(asked.subject)
    except (ValueError, TypeError, IdentityError, UnsupportedAlgorithm) as error:
        raise RefusedError(
            "the certificate request was refused",
            expected="a request in PEM, with a name for a host, for a key on P-256",
            found=error.found if isinstance(error, IdentityError) else str(error)[:200],
        ) from error
    return asked


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise IdentityError(
            f"the private key {path} cannot be read", expected="PEM", found=str(error)[:200]
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"the private key {path} is of another kind", expected="P-256")
    return key


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _signed(
    builder: x509.CertificateBuilder | x509.CertificateSigningRequestBuilder,
    key: ec.EllipticCurvePrivateKey,
) -> bytes:
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _request(name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    return _signed(x509.CertificateSigningRequestBuilder().subject_name(_name(name)), key)


def _key_fingerprint(key: object) -> str:
    """SHA-256 of a public key, in hexadecimal digits."""
    assert isinstance(key, ec.EllipticCurvePublicKey)  # as `_load_request` has seen
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def _name(name: str, role: Role | None = None) -> x509.Name:
    unit = [] if role is None else [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role)]
    return x509.Name([*unit, x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)
