"""Revocation list: the certificates of hosts that were removed, and are refused from then on.

    STATE/node/revoked.json    serial numbers, and until when each would be valid   mode 0600

It is made where the CA is, and sent to the other hosts; on each of them every process reads it
again when it has changed. It stays short: a certificate that has expired is refused anyway.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from lockstep.errors import IdentityError, RefusedError
from lockstep.net.certificates import SKEW_SECONDS
from lockstep.net.identity import PeerIdentity
from lockstep.system.private_files import file_stamp, replace_private

REVOKED = "revoked.json"
Serials = Mapping[str, float]
"""Serial numbers, in hexadecimal digits, and until when each certificate would be valid."""


class RevocationList:
    """The list in the folder of an identity. May be used from any thread."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / REVOKED
        self._lock = threading.Lock()
        self._stamp = self._seen = file_stamp(self._path)
        self._serials: Serials | None = None

    @property
    def serials(self) -> Serials:
        """All that it has now.

        Raises:
            IdentityError: it cannot be read; then nobody can be told from those who were removed.
        """
        with self._lock:
            stamp = file_stamp(self._path)
            if self._serials is None or stamp != self._stamp:
                self._serials, self._stamp = _read(self._path) if stamp else {}, stamp
            return self._serials

    def add(self, serials: Serials, now: float | None = None) -> None:
        """Refuse these, too, from now on; those that have expired are left out."""
        now = time.time() if now is None else now
        every = {**self.serials, **serials}
        kept = {serial: until for serial, until in every.items() if until + SKEW_SECONDS > now}
        if kept != dict(self.serials):
            replace_private(self._path, json.dumps(kept).encode())

    def check(self, peer: PeerIdentity) -> None:
        """Raise `RefusedError` if a peer's certificate was revoked."""
        if peer.serial in self.serials:
            raise removed(peer.node)

    def has_changed(self) -> bool:
        """Whether it has changed since the last call."""
        stamp = file_stamp(self._path)
        with self._lock:
            seen, self._seen = self._seen, stamp
        return stamp != seen


def removed(node: str) -> RefusedError:
    """The error of a host that was removed from its cluster."""
    return RefusedError(
        f"host {node} was removed from the cluster",
        expected="a certificate that is not revoked",
        fix="to join again: lockstep join FILE, with a new token and another folder for --state",
    )


def _read(path: Path) -> Serials:
    try:
        found = json.loads(path.read_bytes())
        return {str(serial): float(until) for serial, until in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise IdentityError(
            f"the list of revoked certificates {path} cannot be read",
            expected="what Lockstep wrote there",
            found=ascii(str(error))[:200],
            fix="if it is damaged, remove it; then remove the hosts again that were removed",
        ) from error
