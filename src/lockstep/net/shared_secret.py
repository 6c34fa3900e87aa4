"""A secret that the hosts of a job share beforehand, in a file: joining without a token for each.

The CA is made when the job begins, so nobody can know its fingerprint before. Who has the secret
proves with it that a CA is the job's: HMAC-SHA256 over the job's name and the certificate. What a
host shows in order to enter is another HMAC, over the job's name and its rank, good for one entry.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.errors import IdentityError, RefusedError
from lockstep.net.identity import check_private
from lockstep.system.private_files import write_private

LEAST_BYTES = 32


def make_secret(path: Path) -> None:
    """Write a new secret to a file that is not there yet, with mode 0600.

    Raises:
        IdentityError: there is a file, or it cannot be written.
    """
    fresh = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        write_private(fresh, secrets.token_hex(LEAST_BYTES).encode() + b"\n")
        try:
            os.link(fresh, path)  # whole from the beginning, and never in the place of another
        finally:
            fresh.unlink()
    except OSError as error:
        raise IdentityError(
            f"the secret cannot be written to {path}",
            expected="a path where nothing is yet, in a folder that can be written to",
            found=error.strerror or str(error),
        ) from None


def read_secret(path: Path) -> bytes:
    """The secret in a file, without white space around it.

    Raises:
        IdentityError: there is none, it is too short, or others can read it.
    """
    fix = f"on one host: lockstep secret {path}; then copy it to the others"
    try:
        check_private(path)
        content = path.read_bytes().strip()
    except OSError as error:
        raise IdentityError(
            f"the secret {path} cannot be read", found=error.strerror or str(error), fix=fix
        ) from None
    if len(content) < LEAST_BYTES:
        raise IdentityError(
            f"the secret {path} is too short",
            expected=f"at least {LEAST_BYTES} bytes, chosen at random",
            found=f"{len(content)} bytes",
            fix=fix,
        )
    return content


@dataclass(frozen=True, kw_only=True)
class SharedSecret:
    """A secret, for one job."""

    secret: bytes = field(repr=False)
    job: str
    """A name for this run that all its hosts know."""

    def proof(self, authority: str) -> str:
        """Shows whoever has the secret that this CA (PEM) is the job's. 64 hexadecimal digits."""
        return self._mac("authority", ssl.PEM_cert_to_DER_cert(authority)).hex()

    def of_rank(self, rank: int) -> bytes:
        """What this rank shows in order to enter: 32 bytes."""
        return self._mac("rank", str(rank).encode())

    def _mac(self, purpose: str, content: bytes) -> bytes:
        job = hashlib.sha256(self.job.encode()).digest()  # of fixed length: parts cannot shift
        said = b"lockstep " + purpose.encode() + b"\0" + job + content
        return hmac.digest(self.secret, said, "sha256")


@dataclass(frozen=True, kw_only=True)
class RankInvitation:
    """What a rank needs in order to enter. An `Invitation`."""

    shared: SharedSecret
    rank: int
    host: str
    port: int
    node: str

    @property
    def secret(self) -> bytes:
        return self.shared.of_rank(self.rank)

    def vouch(self, authority: str, proof: str) -> None:
        """Check that who has sent this CA (PEM) with this proof has the secret.

        Raises:
            RefusedError: it does not have it, or it is of another job.
        """
        try:
            expected = self.shared.proof(authority)
        except ValueError:
            expected = ""
        if not expected or not hmac.compare_digest(
            expected.encode(), proof.encode(errors="replace")
        ):
            raise RefusedError(
                f"{self.host}:{self.port} does not prove that it has the shared secret",
                expected=f"rank 0 of job {self.shared.job!a}, with the same secret file",
                found="a proof by another secret or for another job" if proof else "no proof",
                fix="see that the secret file has the same content on every host",
            )
