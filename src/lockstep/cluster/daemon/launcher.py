"""Cluster launcher: asks a cluster for hosts, for `lockstep run --on ...`.

It asks over a line, so that a job which outlives a restart of `up` is offered again. Whatever
ends the process ends the line, and with it the offer.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from lockstep.agent.job_offer import JobOffer
from lockstep.cluster.daemon.cluster_messages import (
    AskCluster,
    CloseJob,
    ClusterAnswer,
    HostReport,
    JobOpened,
    OpenJob,
    RequestFailed,
)
from lockstep.cluster.daemon.control_socket import ControlConnection, ask
from lockstep.cluster.daemon.node import enrol, home_of, listening_address
from lockstep.cluster.daemon.reconnecting_line import (
    Connected,
    Connection,
    HostConnection,
    LineEvent,
    Lost,
    Received,
    ReconnectingLine,
)
from lockstep.cluster.state_folder import State, host_name
from lockstep.errors import LockstepError, PeerTimeoutError
from lockstep.net.identity import Identity
from lockstep.net.join_tokens import Token
from lockstep.net.transport import Report, ignore
from lockstep.system.messages import Message, printable

OPEN_SECONDS = 15.0
"""How long `up` may take to answer."""
TAKE_SECONDS = 5.0
"""How long hosts may take to say whether they take a job."""


class ClusterLauncher:
    """Brings agents to the hosts of a cluster. A `Launcher`, for one job."""

    def __init__(
        self,
        identity: Identity,
        host: str,
        dial: Callable[[], Connection],
        show: Report,
    ) -> None:
        """`show` is told of what becomes of agents, as `report` is, for people to read."""
        self.identity, self.host = identity, host
        self.workers: int | None = None
        self.report: Report = ignore
        self._dial, self._show = dial, show
        self._offer: JobOffer | None = None
        self._line: ReconnectingLine | None = None
        self._changed = threading.Condition()
        self._hosts: dict[str, str] | None = None
        """What each host has said of the job; None before `up` has answered."""
        self._error: LockstepError | None = None
        self._away = False
        """Whether the line is lost, and that was said."""

    @staticmethod
    def of_this_machine(state: Path, show: Report) -> ClusterLauncher:
        """The cluster of the `up` that runs on this machine.

        Raises:
            PeerClosedError: none runs with this state folder.
        """
        here = ask(state, AskCluster(), ClusterAnswer)
        identity = State(state).identity()
        return ClusterLauncher(identity, here.address[0], lambda: ControlConnection(state), show)

    @staticmethod
    def of_token(token: Token, state: Path, show: Report) -> ClusterLauncher:
        """The cluster that a token invites to. The token is used up the first time.

        Raises:
            LockstepError: as `net.enrolment.join`.
        """
        guest = State(state).guest(token.fingerprint)
        if guest.may_return:
            home = home_of(guest)
        else:
            home = enrol(guest, token, f"{host_name()}-{secrets.token_hex(3)}")
        identity, host = guest.identity(), listening_address(None, home)
        return ClusterLauncher(
            identity, host, lambda: HostConnection(identity, home, host, ignore), show
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def offer(self, offer: JobOffer) -> tuple[str, ...]:
        """Offer the job to all hosts, and to those that come later, until `close`.

        Returns the names of the hosts that have not refused it. Those that do are reported.

        Raises:
            NetworkError: the cluster cannot be reached.
            JobError: it does not take the job.
        """
        assert self._offer is None, "a launcher is for one job"
        self._offer = offer
        self._line = ReconnectingLine(self._dial, self._on)
        self._line.start()
        self._wait(OPEN_SECONDS, lambda: self._hosts is not None)
        self._wait(TAKE_SECONDS, lambda: all((self._hosts or {}).values()))
        with self._changed:
            if self._error is not None:
                raise self._error
            if self._hosts is None:
                raise PeerTimeoutError(
                    "the cluster does not answer", expected=f"hosts within {OPEN_SECONDS:g} s"
                )
            taking = tuple(name for name, said in self._hosts.items() if said != "refused")
        if not self._hosts:  # that hosts have refused was shown
            self._show(
                "cluster",
                "no host has joined: the job begins on this machine alone, and takes hosts that "
                "join\n  to invite one: lockstep token --token-file FILE, then on that machine: "
                "lockstep join FILE",
            )
        return taking

    def close(self) -> None:
        """Offer the job to nobody any more."""
        if self._line is not None:
            assert self._offer is not None
            self._line.tell(CloseJob(job=self._offer.job))
            self._line.close()
            self._line = None

    def _wait(self, seconds: float, done: Callable[[], bool]) -> None:
        limit = time.monotonic() + seconds
        with self._changed:
            while not done() and self._error is None and (left := limit - time.monotonic()) > 0:
                self._changed.wait(left)

    # In the line's thread.

    def _on(self, event: LineEvent) -> None:
        match event:
            case Connected():
                assert self._offer is not None and self._line is not None
                self._away = False
                self._line.tell(OpenJob(offer=self._offer))
            case Received(message):
                self._received(message)
            case Lost(error, final):
                self._lost(error, final=final)

    def _received(self, message: Message) -> None:
        match message:
            case JobOpened(hosts=names):
                with self._changed:
                    self._hosts = dict.fromkeys(names, "")
                    self._changed.notify_all()
            case HostReport(host=host, state=state, why=why):
                with self._changed:
                    if self._hosts is not None:
                        self._hosts[host] = state
                    self._changed.notify_all()
                if why:
                    self.report(host, printable(why))
                    self._show(host, f"{state}: {printable(why)}")
            case RequestFailed(error=error):
                self._lost(error.error())

    def _lost(self, error: LockstepError, *, final: bool = False) -> None:
        with self._changed:
            begun = self._hosts is not None
            if not begun:
                self._error = error
                self._changed.notify_all()
        if begun and (final or not self._away):
            self._away = True
            why = f"{error}\n  the job goes on with the hosts that it has"
            self.report("cluster", why)
            self._show("cluster", why)
