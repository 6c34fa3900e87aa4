"""Host certificates: what `up` does with those of its hosts: it signs, renews and revokes them.

It renews its own as well. They live for a day (`net.certificates`), so that one which is stolen, or
whose host is forgotten, is soon of no use.
"""

from __future__ import annotations

import time

from lockstep.cluster.state_folder import AUTHORITY, NODE, State, host_name
from lockstep.errors import IdentityError, JobError, RefusedError
from lockstep.net.certificates import NODE_SECONDS, Role
from lockstep.net.revocation_list import RevocationList, Serials
from lockstep.system.spelling import meant

LOOK_SECONDS = 60.0
MAX_NAMES = 40
"""That an error lists."""


class HostCertificates:
    """The CA of a cluster, and the identity of the host that it is on."""

    def __init__(self, state: State, name: str | None, seconds: float = NODE_SECONDS) -> None:
        """Both are made on first use. Certificates are valid for so many seconds.

        Raises:
            IdentityError: they cannot be used, or this host has another name.
        """
        from lockstep.net.certificate_authority import Authority  # needs the extra

        if state.has_identity and not (state.path / AUTHORITY).exists():
            raise IdentityError(
                f"{state.path} belongs to a host that has joined a cluster",
                expected="a folder of its own for `lockstep up`",
                fix="give another --state",
            )
        self._authority = Authority.open(state.path / AUTHORITY)
        self._seconds, self._node = seconds, state.path / NODE
        self.identity = self._authority.enrol(
            self._node, name or host_name(), role=Role.HEAD, seconds=seconds
        )
        if name is not None and name != self.identity.node:
            raise IdentityError(
                "this host has another name already",
                expected=name,
                found=f"{self.identity.node}, in {self._node}",
                fix="leave --name out; or give another --state, to begin another cluster",
            )
        self._revoked = RevocationList(self._node)
        self._renewed: dict[str, float] = {}
        """When each host has last got a certificate for its old one; by `time.monotonic`."""
        self._look_at = 0.0

    @property
    def revoked(self) -> Serials:
        """The certificates that are refused."""
        return self._revoked.serials

    def sign(self, request: bytes) -> bytes:
        """A certificate (PEM) for a newcomer's request (PEM). Raises `RefusedError`."""
        return self._authority.sign(request, seconds=self._seconds)

    def renew(self, name: str, request: bytes) -> bytes:
        """Another certificate for a host that is connected by the one that it has.

        Raises:
            RefusedError: it asks for another's, or too often.
        """
        now = time.monotonic()
        if now - self._renewed.get(name, -self._seconds) < self._seconds / 10:
            raise RefusedError(
                f"host {name} wants certificates too often",
                expected=f"one in {self._seconds / 10:g} s at most",
            )
        certificate = self._authority.sign(request, seconds=self._seconds, renews=name)
        self._renewed[name] = now
        return certificate

    def renew_own(self) -> None:
        """Renew this host's own, if that is due. Looks now and then."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + min(self._seconds / 20, LOOK_SECONDS)
        if self.identity.certificate().is_due(time.time()):
            self._authority.enrol(
                self._node, self.identity.node, role=Role.HEAD, seconds=self._seconds
            )

    def remove(self, name: str) -> None:
        """Have everybody refuse a host's certificates, from now on.

        Raises:
            JobError: there is no such host, or it is this one.
        """
        if name == self.identity.node:
            raise JobError(
                f"host {name} is the one that `lockstep up` runs on",
                expected="a host that has joined",
                fix="to end the cluster, end `lockstep up`",
            )
        known = [each for each in self._authority.names if each != self.identity.node]
        if name not in known:
            like = meant(name, known)
            shown = ", ".join(known[:MAX_NAMES]) + (", ..." if len(known) > MAX_NAMES else "")
            raise JobError(
                f"there is no host {name} in this cluster",
                expected=f"one of {shown}" if known else "a host that has joined; none has",
                found=ascii(name),
                fix=f"did you mean {like}?" if like else "",
            )
        self._authority.revoke(name, self._revoked)
        self._renewed.pop(name, None)
