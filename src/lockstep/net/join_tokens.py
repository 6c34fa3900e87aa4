"""Join tokens: an invitation for one host, for a short time, that can be pasted.

    lockstep1-BASE64   of   check (4) · expiry (8) · CA fingerprint (32) · secret (32) · the rest

The rest is the name and the address of the host that enrols. Who has a token can become a host of
the cluster, so it is given in a file or on stdin, never on a command line, and is not logged.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import struct
import threading
from dataclasses import dataclass, field

from lockstep.errors import IdentityError, RefusedError
from lockstep.net.certificates import fingerprint

PREFIX = "lockstep1-"
SECRET_BYTES = 32
MAX_LENGTH = 1024
"""Characters of a token's text."""
KEEP_SECONDS = 86400.0
"""For how long the book can say that a token was used or has expired, and not just unknown."""
_FIXED = struct.Struct(">4sQ32s32s")


@dataclass(frozen=True, kw_only=True)
class Token:
    """What a newcomer needs to find the cluster, to know that it is the right one, and to enter."""

    host: str
    port: int
    node: str
    """The name in the certificate of the host that answers there."""
    fingerprint: bytes
    """SHA-256 of the CA's certificate in DER, 32 bytes."""
    secret: bytes = field(repr=False)
    """32 bytes."""
    expiry: int
    """Seconds since 1970. For the reader: the server goes by its own clock and its own book."""

    def vouch(self, authority: str, proof: str) -> None:
        """Check that a CA (PEM) is the cluster's. The fingerprint does; `proof` is not needed.

        Raises:
            RefusedError: it is another's.
        """
        if fingerprint(authority) != self.fingerprint:
            raise RefusedError(
                f"{self.host}:{self.port} is not of the cluster that the token is for",
                expected=f"the CA {self.fingerprint.hex()}",
                found=f"the CA {fingerprint(authority).hex()}",
                fix="ask for a new token; somebody may be in between",
            )

    def text(self) -> str:
        """The form that is pasted."""
        rest = f"{self.node}\n{self.host}\n{self.port}".encode()
        body = _FIXED.pack(b"", self.expiry, self.fingerprint, self.secret)[4:] + rest
        return PREFIX + base64.urlsafe_b64encode(_check(body) + body).decode().rstrip("=")


def parse_token(text: str) -> Token:
    """The token in a text; spaces around it do not matter.

    Raises:
        IdentityError: it is none, or was cut or altered. Says nothing of what is in it.
    """
    text = text.strip()
    try:
        if not text.startswith(PREFIX) or len(text) > MAX_LENGTH:
            raise ValueError(f"it does not begin with {PREFIX}, or is too long")
        code = text.removeprefix(PREFIX).encode()
        raw = base64.b64decode(code + b"=" * (-len(code) % 4), b"-_", validate=True)
        if len(raw) < _FIXED.size or not hmac.compare_digest(raw[:4], _check(raw[4:])):
            raise ValueError("its checksum is wrong: a part is missing, or was altered")
        _, expiry, fingerprint, secret = _FIXED.unpack_from(raw)
        node, host, port = raw[_FIXED.size :].decode().split("\n")
        token = Token(
            host=host,
            port=int(port),
            node=node,
            fingerprint=fingerprint,
            secret=secret,
            expiry=expiry,
        )
        if not 0 < token.port < 65536 or token.text() != text:
            raise ValueError("it is not in its only form")
    except (ValueError, binascii.Error) as error:
        raise IdentityError(
            "this is not a join token",
            expected=f"the whole line that begins with {PREFIX}",
            found=f"{len(text)} characters; {_plain(error)}",
            fix="copy the token again, or make a new one",
        ) from None  # the cause could quote what it could not read
    return token


@dataclass(kw_only=True)
class _Entry:
    digest: bytes
    expiry: float
    used: bool = False


class TokenBook:
    """The tokens that were given out, as digests of their secrets. Lives in memory, like the job.

    Times are seconds since 1970 and are given by the caller. For any thread.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._lock = threading.Lock()

    def issue(
        self,
        *,
        host: str,
        port: int,
        node: str,
        fingerprint: bytes,
        seconds: float,
        now: float,
    ) -> Token:
        """A new token that lets one host in until `now + seconds`."""
        secret, expiry = secrets.token_bytes(SECRET_BYTES), int(now + seconds)
        self.admit(secret, seconds=seconds, now=now)
        return Token(
            host=host, port=port, node=node, fingerprint=fingerprint, secret=secret, expiry=expiry
        )

    def admit(self, secret: bytes, *, seconds: float, now: float) -> None:
        """Let one host in that shows this secret, until `now + seconds`."""
        entry = _Entry(digest=_digest(secret), expiry=int(now + seconds))
        with self._lock:
            self._entries = [each for each in self._entries if each.expiry + KEEP_SECONDS > now]
            self._entries.append(entry)

    def redeem(self, secret: bytes, now: float) -> None:
        """Use a token up.

        Raises:
            RefusedError: it is unknown, was used before, or has expired.
        """
        digest = _digest(secret)
        with self._lock:
            # Every entry is compared, each in constant time: how long it takes tells nothing.
            found = [entry for entry in self._entries if hmac.compare_digest(entry.digest, digest)]
            if not found:
                _refuse("it is unknown here")
            (entry,) = found
            if entry.used:
                _refuse("it was used before")
            if now >= entry.expiry:
                _refuse(f"it expired {now - entry.expiry:.0f} s ago")
            entry.used = True


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(b"lockstep join token\0" + secret).digest()


def _check(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:4]


def _plain(error: Exception) -> str:
    return str(error) if type(error) is ValueError else "it is not base64 of one"


def _refuse(found: str) -> None:
    raise RefusedError(
        "the join token was refused",
        expected="a token that is fresh: it lets one host in, once",
        found=found,
        fix="ask for a new token",
    )
