"""Head: `lockstep up` enrols hosts, knows which are there, and tells them of jobs."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lockstep.cluster.daemon.cluster_messages import (
    FROM_HOSTS,
    MAX_REVOKED,
    AskCertificate,
    AskCluster,
    AskHosts,
    AskToken,
    CertificateIssued,
    CertificatesRevoked,
    ClusterAddress,
    ClusterAnswer,
    HostRemoved,
    HostRow,
    HostsAnswer,
    RemoveHost,
    RequestFailed,
    TokenAnswer,
)
from lockstep.cluster.daemon.control_socket import ControlSocket
from lockstep.cluster.daemon.host_certificates import HostCertificates
from lockstep.cluster.daemon.reconnecting_line import JOB, facts
from lockstep.cluster.daemon.registry import (
    ConnectionLost,
    Event,
    HostJoined,
    JobClosed,
    JobOffering,
    Registry,
    decide,
    parse,
)
from lockstep.cluster.state_folder import UP, State, check_host
from lockstep.errors import (
    IdentityError,
    LockstepError,
    NetworkError,
    PeerTimeoutError,
    ProtocolError,
)
from lockstep.net.certificates import NODE_SECONDS, Role
from lockstep.net.counted_report import CountedReport
from lockstep.net.enrolment import TOKEN_SECONDS, JoinServer
from lockstep.net.tcp_transport import TcpTransport
from lockstep.net.transport import Report
from lockstep.system.messages import ErrorMessage, Message, encode
from lockstep.system.processes import stop_signals

LOOK_SECONDS = 0.5
MAX_EVENTS = 64
"""Messages that wait to be handled; their senders wait for room, each within bounds of its own."""


@dataclass(frozen=True)
class Heard:
    """A host or a caller has said something; None: it is gone."""

    who: str
    message: Message | None


class Head:
    """The daemon. Everything is decided in the thread that calls `run`, event by event."""

    def __init__(
        self,
        state: State,
        *,
        name: str | None,
        host: str,
        port: int,
        report: Report,
        certificate_seconds: float = NODE_SECONDS,
    ) -> None:
        """Listen; `port` 0 takes the ports of the last time, or new ones. Certificates are valid
        for so many seconds.

        Raises:
            IdentityError: the CA or the identity cannot be used, or nobody can listen there.
            ResourceError: an extra is missing.
        """
        self._report = report
        counted = CountedReport(report)
        self._events: queue.SimpleQueue[Heard | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(MAX_EVENTS)
        """For further events. Not for signals: their handlers must not wait."""
        self._registry = Registry()
        self._closing = threading.Event()
        check_host(host)
        with contextlib.ExitStack() as stack:
            self._certificates = HostCertificates(state, name, certificate_seconds)
            self.identity = self._certificates.identity
            ports = _ports(state, port)
            with _listening(host):
                self._transport = stack.enter_context(
                    contextlib.closing(
                        TcpTransport(
                            self.identity,
                            job=JOB,
                            facts=facts(),
                            codec=FROM_HOSTS,
                            host=host,
                            port=ports[0],
                            answer=True,
                            report=counted,
                            roles=frozenset({Role.HOST}),
                        )
                    )
                )
                self._joins = stack.enter_context(
                    contextlib.closing(
                        JoinServer(
                            self.identity,
                            self._certificates.sign,
                            host=host,
                            port=ports[1],
                            greeting=encode(ClusterAddress(address=self._transport.address)),
                            report=counted,
                        )
                    )
                )
            self.address = self._transport.address
            state.write(UP, {"ports": [self.address[1], self._joins.address[1]]})
            self._control_socket = stack.enter_context(
                contextlib.closing(ControlSocket(state.path, self._put))
            )
            self._stack = stack.pop_all()
        self._hearing = threading.Thread(target=self._hear, name="lockstep up", daemon=True)
        self._hearing.start()

    def token(self, seconds: float = TOKEN_SECONDS) -> str:
        """A new join token, for one host."""
        return self._joins.token(seconds=seconds).text()

    def run(self) -> None:
        """Serve until a signal comes."""
        with stop_signals(lambda: self._events.put(None)):
            while (heard := self._events.get()) is not None:
                self._room.release()
                self._handle(heard)

    def close(self) -> None:
        """Leave no thread and no descriptor. Hosts wait for the next `up`."""
        self._closing.set()
        self._room.release(MAX_EVENTS)  # for whoever waits for room
        self._stack.close()
        self._hearing.join()

    def _hear(self) -> None:
        while not self._closing.is_set():
            try:
                self._certificates.renew_own()
            except (LockstepError, OSError) as error:  # such as no space; it is tried again
                self._report(self.identity.node, f"its certificate cannot be renewed: {error}")
            with contextlib.suppress(PeerTimeoutError):
                heard = self._transport.hear(LOOK_SECONDS)
                self._put(heard.peer, heard.message)

    def _put(self, who: str, message: Message | None) -> None:
        """Have something handled, when there is room. Called from several threads."""
        while not self._room.acquire(timeout=LOOK_SECONDS):
            if self._closing.is_set():
                return
        self._events.put(Heard(who, message))

    def _handle(self, heard: Heard) -> None:
        """Handle what somebody has said. Whatever is wrong with it is its sender's trouble alone:
        it is told, or dropped, and the cluster goes on."""
        try:
            self._decide(heard)
        except LockstepError as error:
            self._report(heard.who, str(error))
            self._tell(heard.who, RequestFailed(error=ErrorMessage.of(error)))
        except Exception as error:  # such as no memory, or no descriptors
            self._report(heard.who, f"what it said cannot be handled: {error!r}")
            self._transport.drop(heard.who, "what it said cannot be handled")

    def _decide(self, heard: Heard) -> None:
        event = self._event(heard)
        if event is None:
            return
        self._note(event)
        self._apply(event)
        if isinstance(event, HostJoined | JobOffering):
            self._tell_revoked(heard.who)

    def _apply(self, event: Event) -> None:
        self._registry, commands = decide(self._registry, event)
        for command in commands:
            self._tell(command.to, command.message)

    def _event(self, heard: Heard) -> Event | None:
        """What is to be decided on; None if it was answered here."""
        who, message = heard.who, heard.message
        if message is None:
            # Unless it has come back before its loss was heard of.
            return ConnectionLost(who) if who not in self._transport.peers else None
        local = who.startswith("@")
        if local and (answer := self._answer(message)) is not None:
            self._tell(who, answer)
            return None
        if isinstance(message, AskCertificate) and not local:
            certificate = self._certificates.renew(who, message.request)
            self._tell(who, CertificateIssued(certificate=certificate))
            return None
        event = parse(who, message)
        if local and not isinstance(event, JobOffering | JobClosed):
            raise ProtocolError("this is for a host to say", found=type(message).__name__)
        if isinstance(event, JobOffering) and event.offer.master != self._name_of(who):
            raise ProtocolError(
                "a job is offered by another host than its master",
                expected=event.offer.master,
                found=self._name_of(who),
            )
        return event

    def _answer(self, message: Message) -> Message | None:
        """What only this machine may ask for."""
        match message:
            case AskCluster():
                return ClusterAnswer(node=self.identity.node, address=self.address)
            case AskHosts():
                return HostsAnswer(hosts=hosts(self._registry))
            case AskToken(seconds=seconds):
                return TokenAnswer(token=self.token(seconds))
            case RemoveHost(name=name):
                return self._remove(name)
        return None

    def _remove(self, name: str) -> HostRemoved:
        """Lose a host for good. Raises `JobError` if there is none of that name."""
        connected, member = name in self._transport.peers, self._registry.members.get(name)
        jobs = [] if member is None else [j for j, said in member.jobs.items() if said == "taken"]
        offers = [job for job, each in self._registry.open_jobs.items() if each.asker == name]
        self._certificates.remove(name)
        self._transport.lose_revoked()
        self._report(name, "is removed from the cluster")
        self._apply(ConnectionLost(name, "the host was removed from the cluster"))
        for other in self._transport.peers:
            self._tell_revoked(other)
        return HostRemoved(name=name, connected=connected, jobs=jobs, offers=offers)

    def _tell_revoked(self, who: str) -> None:
        """Tell a host which certificates are revoked; the masters of this machine read it where
        it is written."""
        serials = self._certificates.revoked
        if serials and not who.startswith("@"):
            latest = sorted(serials.items(), key=lambda each: each[1])[-MAX_REVOKED:]
            self._tell(who, CertificatesRevoked(serials=dict(latest)))

    def _name_of(self, who: str) -> str:
        return self.identity.node if who.startswith("@") else who

    def _tell(self, who: str, message: Message) -> None:
        if who.startswith("@"):
            self._control_socket.tell(who, message)
            return
        with contextlib.suppress(NetworkError):  # its loss will be heard of
            self._transport.tell(who, message)

    def _note(self, event: Event) -> None:
        """Say in the log who comes and who offers what; who goes is told by the transport."""
        match event:
            case HostJoined(name, workers):
                self._report(name, f"takes jobs, with {workers} workers")
            case JobOffering(who, offer):
                self._report(self._name_of(who), f"offers job {offer.job!a}: {offer.task!a}")
            case JobClosed(who, job):
                self._report(self._name_of(who), f"offers job {job!a} no more")


def hosts(registry: Registry) -> list[HostRow]:
    """The members, by name."""
    return [
        HostRow(name=name, workers=member.workers, jobs=dict(member.jobs))
        for name, member in sorted(registry.members.items())
    ]


def _ports(state: State, port: int) -> tuple[int, int]:
    """Where to listen for hosts and for newcomers: as told, or as the last time."""
    if port:
        return port, port + 1
    match state.read(UP).get("ports"):
        case [int(first), int(second)] if 0 < first < 65536 and 0 < second < 65536:
            return first, second
    return 0, 0


@contextlib.contextmanager
def _listening(host: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise IdentityError(
            f"nobody can listen on {host}",
            expected="an address of this machine and a port that is free",
            found=str(error),
            fix="give an address with --host and a port with --port; see that no other `up` runs",
        ) from None


def run_up(
    path: Path,
    *,
    name: str | None,
    host: str,
    port: int,
    report: Report,
    ready: Callable[[Head], None],
) -> None:
    """Serve a cluster until a signal comes. `ready` is called once all is there.

    Raises:
        LockstepError: see `Head`.
    """
    state = State(path)
    with (
        state.lock(),
        contextlib.closing(Head(state, name=name, host=host, port=port, report=report)) as up,
    ):
        ready(up)
        up.run()
