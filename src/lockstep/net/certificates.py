"""Certificates: names, roles, fingerprints, and what a certificate says."""

from __future__ import annotations

import hashlib
import re
import ssl
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from lockstep.errors import IdentityError, ResourceError

if TYPE_CHECKING:
    from cryptography import x509

NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
NODE_SECONDS = 86400.0
"""For how long a host's certificate is valid. It is renewed while the host is connected."""
RUN_SECONDS = 90 * 86400.0
"""The same where the CA is made for one run and ends with it: nobody renews there."""
SKEW_SECONDS = 300.0
"""Certificates are valid from so long ago, for hosts whose clocks are behind."""


class Role(StrEnum):
    """What a host may act as. In its certificate, as the subject's organizational unit."""

    HEAD = "head"
    """Who enrols the others, and tells them of jobs: `lockstep up`, rank 0, the master on Ray."""
    HOST = "host"
    """Everybody else."""


EVERY_ROLE = frozenset(Role)


@dataclass(frozen=True, kw_only=True)
class HostCertificate:
    """What a host's certificate says."""

    node: str
    role: Role | None
    """None: it is of a version of Lockstep that knew no roles."""
    serial: str
    """In hexadecimal digits."""
    since: float
    """When it was issued, in seconds since 1970."""
    until: float

    def is_due(self, now: float) -> bool:
        """Whether it is to be renewed: a third of its life is over, or it has no role."""
        return self.role is None or now > self.since + (self.until - self.since) / 3


def check_name(name: str) -> str:
    """The name, if a host may have it.

    Raises:
        IdentityError: it is too long, or has characters that are not allowed.
    """
    if not NAME.fullmatch(name):
        raise IdentityError(
            "this is not a name for a host",
            expected="1 to 63 of a-z, 0-9, '.', '_' and '-', with a letter or digit at both ends",
            found=repr(name[:80]),
        )
    return name


def fingerprint(certificate: str) -> bytes:
    """SHA-256 of a certificate in PEM, taken over its DER: 32 bytes.

    Raises:
        IdentityError: it is not PEM.
    """
    return hashlib.sha256(_der(certificate)).digest()


def one_certificate(text: str) -> str:
    """The certificate in a PEM text, and nothing else that the text may hold.

    A fingerprint covers the first certificate alone; OpenSSL would trust a second one as well.

    Raises:
        IdentityError: it is not PEM.
    """
    return ssl.DER_cert_to_PEM_cert(_der(text))


def _der(certificate: str) -> bytes:
    try:
        return ssl.PEM_cert_to_DER_cert(certificate)
    except ValueError as error:
        raise IdentityError(
            "this is not a certificate", expected="PEM", found=str(error)
        ) from error


def missing_cryptography() -> ResourceError:
    """What to raise where `cryptography` is not installed."""
    return ResourceError(
        "certificates need the package cryptography",
        expected="the extra `net`",
        found="no cryptography in this environment",
        fix="pip install 'lockstep-dlp[net]'",
    )


def name_in(certificate: bytes) -> str:
    """The name of the host in a certificate in PEM. Verifies nothing.

    Raises:
        IdentityError: there is none.
    """
    return common_name(load_certificate(certificate).subject)


def host_certificate(certificate: bytes) -> HostCertificate:
    """What a host's certificate in PEM says. Verifies nothing.

    Raises:
        IdentityError: it is none.
    """
    from cryptography.x509.oid import NameOID

    found = load_certificate(certificate)
    units = found.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    return HostCertificate(
        node=common_name(found.subject),
        role=role_of([str(unit.value) for unit in units]),
        serial=f"{found.serial_number:x}",
        since=found.not_valid_before_utc.timestamp() + SKEW_SECONDS,
        until=found.not_valid_after_utc.timestamp(),
    )


def role_of(units: list[str]) -> Role | None:
    """The role that a subject's organizational units name; None: no role, or not just one."""
    return Role(units[0]) if len(units) == 1 and units[0] in EVERY_ROLE else None


def load_certificate(content: bytes) -> x509.Certificate:
    """A certificate in PEM.

    Raises:
        IdentityError: it is none.
    """
    try:
        from cryptography import x509
    except ImportError as error:
        raise missing_cryptography() from error
    try:
        return x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise IdentityError(
            "a certificate cannot be read", expected="PEM", found=str(error)[:200]
        ) from error


def common_name(subject: x509.Name) -> str:
    """The host's name in a subject.

    Raises:
        IdentityError: it has none, or more than one, or not a host's.
    """
    from cryptography.x509.oid import NameOID

    names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return check_name(str(names[0].value) if len(names) == 1 else "")
