"""Node: `lockstep join` waits for jobs, and has an agent for each: another one where one has died
(see `restart_policy`).

Its line to `up` comes back when `up` does. Agents do not depend on that: they talk to the master.
"""

from __future__ import annotations

import queue
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from lockstep.agent.job_offer import JobOffer, without_contents
from lockstep.cluster.daemon.admission import Allowed, may_call, names_files, refusal
from lockstep.cluster.daemon.agent_processes import END_SECONDS, Agents, Ended
from lockstep.cluster.daemon.cluster_messages import (
    GREETING,
    JobOffered,
    JobState,
    JobWithdrawn,
    RequestFailed,
    TakeJobs,
    report_of,
)
from lockstep.cluster.daemon.reconnecting_line import (
    Connected,
    HostConnection,
    LineEvent,
    Lost,
    Received,
    ReconnectingLine,
)
from lockstep.cluster.daemon.restart_policy import AgentRun, Died, Done, Offered, Withdrawn, decide
from lockstep.cluster.state_folder import (
    CLUSTER,
    CODE,
    NODE,
    Home,
    State,
    address_towards,
    check_certificate,
    check_host,
    is_loopback,
)
from lockstep.errors import IdentityError, JobError, LockstepError
from lockstep.net.enrolment import join
from lockstep.net.identity import Identity
from lockstep.net.join_tokens import Token
from lockstep.net.transport import Report
from lockstep.system.messages import Message
from lockstep.system.processes import stop_signals

JOIN_SECONDS = 30.0
WITHDRAWN_SECONDS = 30.0
"""How long an agent may go on when its job is not offered any more: to say goodbye."""
LOOK_SECONDS = 0.5
MAX_JOBS = 16
"""That a host takes part in at one time."""


@dataclass(frozen=True)
class Stop:
    """Somebody wants this process to end."""


@dataclass(kw_only=True)
class Running:
    """A job that this host takes part in."""

    offer: JobOffer
    run: AgentRun
    folder: Path | None = None
    """Where the code is that the master sends, if it does."""
    starts_at: float | None = None
    """When it gets another agent, if it has none; likewise."""
    ends_at: float | None = None
    """When its agent is ended, if it is to be; in seconds of `time.monotonic`."""
    asked: bool = False
    """Whether it was told so."""


def enrol(state: State, token: Token, name: str) -> Home:
    """Become a host of the token's cluster, and remember it; or one again, under the name that it
    had, when its certificate has expired.

    Raises:
        IdentityError: this host has joined a cluster before.
        NetworkError: as `net.enrolment.join`.
    """
    again = state.has_identity
    if again and (state.may_return or token.fingerprint != state.cluster_fingerprint):
        raise IdentityError(
            f"this host has joined a cluster already, as {state.identity().node}",
            expected="a state folder without an identity",
            found=str(state.path / NODE),
            fix="to come back to that cluster: lockstep join, without a token; "
            "to join another: --state with another folder",
        )
    _, greeting = join(token, state.path / NODE, name, timeout=JOIN_SECONDS, again=again)
    home = Home(node=token.node, address=GREETING.decode(greeting).address)
    state.write(CLUSTER, home.to_message())
    return home


def home_of(state: State) -> Home:
    """Where this host's cluster is.

    Raises:
        IdentityError: it has not joined one, or not been there for too long.
    """
    known = state.read(CLUSTER)
    if not known or not state.has_identity:
        raise IdentityError(
            "this host has joined no cluster yet",
            expected=f"an identity in {state.path}",
            fix="where `lockstep up` runs: lockstep token --token-file FILE; "
            "here: lockstep join FILE",
        )
    check_certificate(state.identity())
    return Home.from_message(known)


def listening_address(host: str | None, home: Home) -> str:
    """The address that others reach this host at: the one given, or the one that leads to `up`."""
    if host is not None:
        return check_host(host)
    return "127.0.0.1" if is_loopback(home.address[0]) else address_towards(home.address)


class Node:
    """The daemon. Everything is done in the thread that calls `run`, event by event."""

    def __init__(
        self,
        identity: Identity,
        home: Home,
        *,
        host: str,
        workers: int,
        allowed: Allowed,
        code: Path,
        report: Report,
    ) -> None:
        """`code`: a folder that nobody else uses, for code that masters send."""
        self.identity, self.home, self.host = identity, home, host
        self.workers, self.allowed, self.report = workers, allowed, report
        self._code = code
        self._events: queue.SimpleQueue[LineEvent | Ended | Stop] = queue.SimpleQueue()
        self._agents = Agents(self._events.put)
        self._running: dict[str, Running] = {}
        self._line: ReconnectingLine | None = None
        self._trouble = ""

    def run(self) -> None:
        """Take part in jobs until a signal comes.

        Raises:
            RefusedError, IdentityError: the cluster does not have this host any more.
        """
        with stop_signals(lambda: self._events.put(Stop())):
            self._line = ReconnectingLine(self._dial, self._events.put)
            self._line.start()
            try:
                while self._handle():
                    self._tend(time.monotonic())
            finally:
                self._line.close()
                self._agents.close()

    def _dial(self) -> HostConnection:
        return HostConnection(self.identity, self.home, self.host, self.report)

    def _handle(self) -> bool:
        """Take one event, if there is one soon; returns whether to go on."""
        try:
            event = self._events.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            return True
        match event:
            case Stop():
                return False
            case Connected():
                self._connected()
            case Received(message):
                self._received(message)
            case Lost(error, final):
                if final:
                    raise error
                self._lost(error)
            case Ended():
                self._ended(event)
        return True

    def _connected(self) -> None:
        self._trouble = ""
        host, port = self.home.address
        self.report(self.identity.node, f"waits for jobs of {self.home.node} at {host}:{port}")
        self._tell(TakeJobs(workers=self.workers))

    def _lost(self, error: LockstepError) -> None:
        if self._trouble != error.what:  # not each of many attempts
            self._trouble = error.what
            self.report(self.home.node, f"{error}\n  it is tried again until it is there")

    def _received(self, message: Message) -> None:
        match message:
            case JobOffered(offer=offer):
                self._offered(offer)
            case JobWithdrawn(job=job):
                self._withdrawn(job)
            case RequestFailed(error=error):
                self.report(self.home.node, str(error.error()))
            case _:
                self.report(
                    self.home.node, f"sends {type(message).__name__}, which is not for a host"
                )

    def _offered(self, offer: JobOffer) -> None:
        job = offer.job
        if job in self._running:  # `up` has come back, and so has the job
            running = self._running[job]
            running.run, _ = decide(running.run, Offered())
            running.ends_at, running.asked = None, False
            self._say(job, "taken", "")
            return
        error = refusal(offer, self.allowed, self.identity.node)
        if error is None and len(self._running) >= MAX_JOBS:
            error = JobError(
                "this host takes part in too many jobs", expected=f"{MAX_JOBS} at most"
            )
        if error is not None:
            self.report(f"job {job!a}", str(error))
            self._say(job, "refused", str(error))
            return
        self._running[job] = Running(offer=offer, run=AgentRun())
        self._start(self._running[job])

    def _start(self, running: Running) -> None:
        offer, running.starts_at = running.offer, None
        running.folder = Path(mkdtemp(dir=self._code)) if offer.code else None
        self._agents.start(
            offer,
            identity=str(self.identity.folder),
            workers=self.workers,
            host=self.host,
            folder=running.folder,
            functions=may_call(offer, self.allowed),
            discreet=names_files(offer),
        )
        pid = self._agents.pid(offer.job)
        self.report(f"job {offer.job!a}", f"{offer.task!a}: agent {pid}, {self.workers} workers")
        self._say(offer.job, "taken", "")

    def _withdrawn(self, job: str) -> None:
        running = self._running.get(job)
        if running is None or not running.run.offered:
            return
        running.run, why = decide(running.run, Withdrawn())
        self.report(f"job {job!a}", why)
        if running.starts_at is None:
            running.ends_at = time.monotonic() + WITHDRAWN_SECONDS
        else:
            del self._running[job]
            self._say(job, "ended", "")

    def _tend(self, now: float) -> None:
        """Start agents whose time has come, and end those whose time is up; those who do not
        listen, at once."""
        for job, running in self._running.items():
            if running.starts_at is not None and now >= running.starts_at:
                self._start(running)
            if running.ends_at is not None and now > running.ends_at:
                self._agents.end(job, at_once=running.asked)
                running.asked, running.ends_at = True, now + END_SECONDS

    def _ended(self, ended: Ended) -> None:
        job, error = ended.job, ended.error
        self._agents.reap(job)
        running = self._running[job]
        if running.folder is not None:
            shutil.rmtree(running.folder, ignore_errors=True)
        event = Died(error, ended.moved) if error else Done()
        running.run, follows = decide(running.run, event)
        if running.run.wait is None:
            del self._running[job]
        else:
            running.starts_at = time.monotonic() + running.run.wait
        if error is None or not running.run.offered:
            self.report(f"job {job!a}", "its agent has ended")
            self._say(job, "ended", "")
            return
        self.report(f"job {job!a}", f"{error}\n  {follows}")
        said = without_contents(error) if names_files(running.offer) else error
        self._say(job, "failed", f"{said}\n  {follows}")

    def _say(self, job: str, state: JobState, why: str) -> None:
        self._tell(report_of(job, state, why))

    def _tell(self, message: Message) -> None:
        assert self._line is not None
        self._line.tell(message)


def run_member(
    path: Path,
    token: Token | None,
    *,
    name: str,
    host: str | None,
    workers: int,
    allowed: Allowed,
    report: Report,
) -> None:
    """Join with a token, or come back without one, and stay.

    Raises:
        LockstepError: this host is not let in, or not any more.
    """
    state = State(path)
    with state.lock():
        home = enrol(state, token, name) if token else home_of(state)
        with state.emptied(CODE) as code:
            member = Node(
                state.identity(),
                home,
                host=listening_address(host, home),
                workers=workers,
                allowed=allowed,
                code=code,
                report=report,
            )
            member.run()
