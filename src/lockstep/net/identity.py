"""Who a host is: its key, its certificate, and the TLS contexts that are made of them.

    STATE/node/node.key       the host's private key, which never leaves it   mode 0600
    STATE/node/node.pem       its certificate, with its name, signed by the CA
    STATE/node/authority.pem  the CA's certificate

All connections are TLS 1.3. Between hosts both sides show a certificate of the cluster's CA; the
name in it, and nothing that the peer says, is who the peer is.
"""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.errors import IdentityError
from lockstep.net.certificates import check_name, name_in
from lockstep.net.tls_stream import TlsStream

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

    def server_context(self) -> ssl.SSLContext:
        """For connections that other hosts open: they must show a certificate of the same CA."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client_context(self) -> ssl.SSLContext:
        """For connections to other hosts. The caller compares `peer_name` with who it wanted."""
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


def peer_name(sock: TlsStream) -> str:
    """The name in the peer's certificate, which TLS has verified.

    Raises:
        IdentityError: there is none that a host may have.
    """
    certificate: Mapping[str, Any] = sock.getpeercert() or {}
    subject = [pair for entry in certificate.get("subject", ()) for pair in entry]
    names = [value for kind, value in subject if kind == "commonName"]
    return check_name(names[0] if len(names) == 1 else "")


def private_folder(folder: Path) -> Path:
    """The folder, made if need be, that only this user may enter."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only this user may read, and that was not there before."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


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
