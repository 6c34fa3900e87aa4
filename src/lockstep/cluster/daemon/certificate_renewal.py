"""Certificate renewal: a connected host asks `up` for another certificate, long before the end of
the one that it has, and learns which hosts were removed.

Its agents, and the master of its job, read both in its identity's folder.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

from lockstep.cluster.daemon.cluster_messages import (
    AskCertificate,
    CertificateIssued,
    CertificatesRevoked,
)
from lockstep.errors import LockstepError
from lockstep.net.identity import Identity
from lockstep.net.revocation_list import RevocationList
from lockstep.net.transport import Report
from lockstep.system.messages import Message

SHORTEST_LOOK, LONGEST_LOOK = 0.2, 60.0
"""Seconds between two looks at the certificate."""


class CertificateRenewal:
    """Of one host, over one connection. For one thread."""

    def __init__(self, identity: Identity, report: Report) -> None:
        self._identity, self._report = identity, report
        self._look_at = 0.0

    def due(self, now: float) -> Message | None:
        """What to ask `up` for, if anything; `now` is of `time.monotonic`."""
        if now < self._look_at:
            return None
        self._look_at = now + LONGEST_LOOK
        try:
            return self._asked(now)
        except (LockstepError, OSError) as error:
            self._report(self._identity.node, f"its certificate cannot be renewed: {error}")
            return None

    def _asked(self, now: float) -> Message | None:
        from lockstep.net.certificate_authority import renewal_request  # needs the extra

        known = self._identity.certificate()
        pause = max((known.until - known.since) / 8, SHORTEST_LOOK)
        if not known.is_due(time.time()):
            self._look_at = now + min(pause, LONGEST_LOOK)
            return None
        self._look_at = now + pause  # for the answer, or another attempt
        return AskCertificate(request=renewal_request(self._identity.folder))

    def take(self, message: Message) -> bool:
        """Take a message of `up` that is about certificates; returns whether it is. What cannot
        be written is said, and comes again."""
        try:
            match message:
                case CertificateIssued(certificate=certificate):
                    self._renew(certificate)
                case CertificatesRevoked(serials=serials):
                    RevocationList(self._identity.folder).add(serials)
                case _:
                    return False
        except (LockstepError, OSError) as error:
            self._report(self._identity.node, f"its certificates are not up to date: {error}")
        return True

    def _renew(self, certificate: bytes) -> None:
        from lockstep.net.certificate_authority import renew

        renew(self._identity.folder, certificate)
        until = datetime.fromtimestamp(self._identity.certificate().until, UTC)
        self._report(self._identity.node, f"its certificate is renewed, until {until:%F %T} UTC")
