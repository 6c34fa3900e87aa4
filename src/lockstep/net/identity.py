"""Who a host is: its key, its certificate, and the TLS contexts that are made of them.

    STATE/node/node.key       the host's private key, which never leaves it   mode 0600
    STATE/node/node.pem       its certificate, with its name, signed by the CA
    STATE/node/authority.pem  the CA's certificate

All connections are TLS 1.3. Between hosts both sides show a certificate of the cluster's CA; the
name and the role in it, and nothing that the peer says, are who the peer is. A certificate that is
renewed takes the old one's place in the folder, and every process uses it from its next connection.
"""

from __future__ import annotations

import contextlib
import ssl
import stat
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.errors import IdentityError, RefusedError
from lockstep.net.certificates import (
    HostCertificate,
    Role,
    check_name,
    host_certificate,
    name_in,
    role_of,
)
from lockstep.net.tls_stream import TlsStream
from lockstep.system.private_files import file_stamp

KEY, CERTIFICATE, AUTHORITY = "node.key", "node.pem", "authority.pem"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The files that say who this host is. Reading them is left to `ssl`."""

    node: str
    folder: Path

    @staticmethod
    def load(folder: Path) -> Identity:
        """The identity in a folder.

        Raises:
            IdentityError: files are missing, unusable, or the key is open to other users.
        """
        for name in (KEY, CERTIFICATE, AUTHORITY):
            if not (folder / name).is_file():
                raise IdentityError(
                    f"{folder} holds no identity",
                    expected=f"{KEY}, {CERTIFICATE} and {AUTHORITY}",
                    found=f"no {name}",
                    fix="join the cluster with a token",
                )
        check_private(folder / KEY)
        return Identity(node=name_in((folder / CERTIFICATE).read_bytes()), folder=folder)

    def certificate(self) -> HostCertificate:
        """What its certificate says now.

        Raises:
            IdentityError: it cannot be read.
        """
        try:
            return host_certificate((self.folder / CERTIFICATE).read_bytes())
        except OSError as error:
            raise IdentityError(
                f"the identity in {self.folder} cannot be read", found=str(error)
            ) from None

    def server_context(self) -> ssl.SSLContext:
        """For connections that other hosts open: they must show a certificate of the same CA."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client_context(self) -> ssl.SSLContext:
        """For connections to other hosts. `peer_identity` is to be compared with who is meant."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def open_context(self) -> ssl.SSLContext:
        """For connections of newcomers, who have no certificate yet."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_NONE
        return context

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = _strict(protocol)
        try:
            context.load_verify_locations(self.folder / AUTHORITY)
            context.load_cert_chain(self.folder / CERTIFICATE, self.folder / KEY)
        except (ssl.SSLError, OSError) as error:
            raise IdentityError(
                f"the identity in {self.folder} cannot be used",
                expected="a key, its certificate and the CA's certificate, in PEM",
                found=str(error),
                fix="remove the folder and join the cluster again with a new token",
            ) from error
        return context


def newcomer_context(authority: str | None) -> ssl.SSLContext:
    """For the connections of a newcomer: to a host of this CA (PEM), or to one it cannot tell yet.

    Over the latter nothing is said; it only brings the certificate that the token speaks of.
    """
    context = _strict(ssl.PROTOCOL_TLS_CLIENT)
    if authority is None:
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(cadata=authority)
    return context


class RenewedContext:
    """A TLS context of an identity, made anew when the certificate has been renewed."""

    def __init__(self, identity: Identity, make: Callable[[], ssl.SSLContext]) -> None:
        """`make`: the method of the identity that makes it.

        Raises:
            IdentityError: the identity cannot be used.
        """
        self._path, self._make = identity.folder / CERTIFICATE, make
        self._lock = threading.Lock()
        self._stamp = file_stamp(self._path)
        self._context = make()

    def current(self) -> ssl.SSLContext:
        """The context to be used now. The last one stays in use where the files are gone."""
        with self._lock:
            stamp = file_stamp(self._path)
            if stamp not in (None, self._stamp):
                with contextlib.suppress(IdentityError):
                    self._context = self._make()
                    self._stamp = stamp
            return self._context


@dataclass(frozen=True, kw_only=True)
class PeerIdentity:
    """Who a peer is, by its certificate, which TLS has verified."""

    node: str
    role: Role | None
    serial: str

    def check_role(self, roles: frozenset[Role]) -> None:
        """Check that it may act as what it is at this connection.

        Raises:
            RefusedError: its certificate is for something else.
        """
        if self.role is None:
            raise RefusedError(
                f"the certificate of host {self.node} has no role",
                expected="one of this version of Lockstep",
                fix="on that host: lockstep join FILE, with a new token",
            )
        if self.role not in roles:
            raise RefusedError(
                f"host {self.node} may not act as {' or '.join(sorted(roles))} here",
                expected=f"a certificate with the role {' or '.join(sorted(roles))}",
                found=f"one with the role {self.role}",
            )


def peer_identity(sock: TlsStream) -> PeerIdentity:
    """Who the peer is.

    Raises:
        IdentityError: its certificate has no name that a host may have.
    """
    certificate: Mapping[str, Any] = sock.getpeercert() or {}
    subject = [pair for entry in certificate.get("subject", ()) for pair in entry]
    names = [value for kind, value in subject if kind == "commonName"]
    units = [value for kind, value in subject if kind == "organizationalUnitName"]
    return PeerIdentity(
        node=check_name(names[0] if len(names) == 1 else ""),
        role=role_of(units),
        serial=f"{int(certificate.get('serialNumber', '0'), 16):x}",
    )


def private_folder(folder: Path) -> Path:
    """The folder, made if need be, that only this user may enter."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def check_private(path: Path) -> None:
    """Raise `IdentityError` if others may read or write the file."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise IdentityError(
            f"{path} is open to other users",
            expected="mode 0600",
            found=f"mode {mode:04o}",
            fix=f"if nobody has read it: chmod 600 {path}",
        )


def _strict(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    # Who the peer is stands in its certificate's subject, not in a name of the DNS.
    context.check_hostname = False
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # connections last; and a ticket would let one come back unchecked
    return context
