"""Certificates for Ray's own TLS: a CA of its own, and one certificate for every address here."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

DAY = datetime.timedelta(days=1)


def credentials(folder: Path, *addresses: str) -> dict[str, str]:
    """What turns TLS on in Ray; makes the files, each with mode 0600, in a new folder."""
    folder.mkdir(mode=0o700)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a CA for Ray")])
    ca = _certificate(issuer, issuer, ca_key, ca_key, x509.BasicConstraints(True, 0))
    here = [x509.IPAddress(ipaddress.ip_address(each)) for each in ("127.0.0.1", *addresses)]
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), *here])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a node of Ray")])
    issued = _certificate(subject, issuer, key, ca_key, names)
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_CA_CERT": _write(folder / "ca.pem", ca),
        "RAY_TLS_SERVER_CERT": _write(folder / "node.pem", issued),
        "RAY_TLS_SERVER_KEY": _write(
            folder / "node.key",
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        ),
    }


def answer(address: str, environment: dict[str, str], *, certificate: bool) -> bytes:
    """The first bytes that a server of Ray's says to a client over TLS, with or without our
    certificate: those of HTTP/2, or none if it hangs up."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=environment["RAY_TLS_CA_CERT"])
    context.set_alpn_protocols(["h2"])
    if certificate:
        context.load_cert_chain(
            environment["RAY_TLS_SERVER_CERT"], environment["RAY_TLS_SERVER_KEY"]
        )
    with (
        socket.create_connection((host, int(port)), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        secure.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
        return secure.recv(64)


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    extension: x509.ExtensionType,
) -> bytes:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
        .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
    )
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _write(path: Path, content: bytes) -> str:
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(content)
    return str(path)
