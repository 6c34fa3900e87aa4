"""The agent: what takes part in a job on another host than the master's.

It loads the task, connects to the master, sets up its host's memory and workers, and then does as
it is told until the master ends the job, or is lost.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lockstep.agent import membership
from lockstep.agent.answer_chunks import in_chunks
from lockstep.agent.host_messages import (
    FROM_MASTER,
    AgentFailed,
    EventForwarded,
    ExchangeTrouble,
    HostPaused,
    HostPresent,
    HostReady,
    HostRefused,
    InferBatches,
    JobEnded,
    LeaseExtended,
    PauseWorkers,
    PlanAssigned,
    Recovered,
    ResumeWorkers,
    SendState,
    StepRecorded,
)
from lockstep.agent.job_offer import JobOffer
from lockstep.agent.local_host import LocalHost
from lockstep.agent.observer import NullObserver
from lockstep.agent.worker_group import WorkerGroup
from lockstep.collectives.host_mesh import HostMesh
from lockstep.errors import (
    JobError,
    LockstepError,
    NetworkError,
    PeerTimeoutError,
    ProtocolError,
    RefusedError,
)
from lockstep.job.code_archive import unpack
from lockstep.job.task_source import TaskSource
from lockstep.net.blob_transfer import fetch
from lockstep.net.control_link import ControlLink
from lockstep.net.handshake import gather
from lockstep.net.identity import Identity
from lockstep.net.tcp_transport import TcpTransport
from lockstep.net.transport import Heard, Report
from lockstep.planning.plan import Plan
from lockstep.system.messages import ErrorMessage, Message
from lockstep.system.shared_memory import Segment

CONNECT_SECONDS = 30.0
PLAN_SECONDS = 1800.0
"""How long the master may take to plan: it waits for the slowest host to load its data."""


def serve(
    identity: Identity,
    offer: JobOffer,
    *,
    workers: int,
    host: str,
    report: Report,
    folder: Path | None = None,
    moved: Callable[[], object] = lambda: None,
) -> None:
    """Take part in a job until it ends.

    Args:
        identity: who this host is.
        offer: the job.
        workers: how many workers this host would run.
        host: the address that other hosts reach this one at.
        report: told of connections that are refused, or lost without a goodbye.
        folder: a private and empty folder, the caller's to remove afterwards, for code that the
            master sends. The caller has seen that its digest is allowed. None: no code is taken.
        moved: called once, when this host has taken part in a step.

    Raises:
        RefusedError: this host differs from the master's; says in what.
        NetworkError: the master cannot be reached, or is lost.
        LockstepError: the job cannot go on here; the master knows.
    """
    silence = float(offer.settings.get("host_seconds", 10.0))
    with ExitStack() as stack:
        transport = TcpTransport(
            identity,
            job=offer.job,
            facts={},
            codec=FROM_MASTER,
            host=host,
            silence=silence,
            report=report,
        )
        stack.callback(transport.close)
        transport.connect({offer.master: offer.address}, CONNECT_SECONDS)
        link = ControlLink(transport)
        stack.callback(link.close)
        agent: Agent | None = None
        try:
            source = TaskSource(
                name=offer.task,
                args=dict(offer.args),
                folder=_fetch_code(link, offer, folder, silence),
                offered=True,
            )
            settings = dict(offer.settings)
            records = None if offer.records is None else offer.records.as_request()
            with _fetched_data(link, offer, silence) as data:
                local = LocalHost.start(source, settings, records, networked=True, data=data)
            stack.enter_context(local)
            local.name = identity.node
            mesh = HostMesh(identity, host, offer.job, report, link.wake, silence)
            stack.callback(mesh.close)
            agent = Agent(local, link, mesh, offer.master, silence, moved)
            agent.run(workers)
        except NetworkError:
            raise
        except LockstepError as error:
            step = (
                agent.worker_group.step
                if agent is not None and agent.worker_group is not None
                else 0
            )
            link.tell(offer.master, AgentFailed(error=ErrorMessage.of(error), step=step))
            _await_end(link)
            raise


def _fetch_code(link: ControlLink, offer: JobOffer, folder: Path | None, silence: float) -> str:
    """Put the code that goes with an offer into its folder; where it is, or "" if none goes."""
    if offer.code is None:
        return ""
    if folder is None:
        raise JobError(
            "this host takes no code from another",
            expected="a task that is installed here",
            found=f"code {offer.code.digest}",
            fix="leave out ship_code",
        )
    data = bytearray(offer.code.nbytes)
    fetch(link, offer.master, "code", offer.code, memoryview(data), silence)
    unpack(bytes(data), folder)
    return str(folder)


@contextlib.contextmanager
def _fetched_data(link: ControlLink, offer: JobOffer, silence: float) -> Iterator[Segment | None]:
    """The data sets or the records that the master sends, in memory, if it does."""
    if offer.data is None:
        yield None
        return
    with contextlib.closing(Segment.create("data", offer.data.nbytes)) as segment:
        with memoryview(segment.map)[: segment.nbytes] as content:
            fetch(link, offer.master, "data", offer.data, content, silence)
        yield segment


def facts_of(loaded: Mapping[str, Any]) -> dict[str, str]:
    """What has to be the same on all hosts, from what the nursery knows of its task."""
    return gather(**{name: loaded[name] for name in ("probe", "code", "data", "fitted")})


class Agent:
    """One host's part in a job, from the plan to its end."""

    def __init__(
        self,
        host: LocalHost,
        link: ControlLink,
        mesh: HostMesh,
        master: str,
        silent_seconds: float,
        moved: Callable[[], object],
    ) -> None:
        """The master is given up after so many seconds without a sign of life."""
        self.host, self.link, self.mesh, self.master = host, link, mesh, master
        self._silent_seconds = silent_seconds
        self.worker_group: Following | None = None
        self._ready = self._ended = self._moved = False
        self._tell_moved = moved
        self._asked: deque[InferBatches | SendState] = deque()
        """What is to be done when all rest: held-out batches, or the state to be given."""

    def run(self, workers: int) -> None:
        """Load the task, say that this host is there, and serve."""
        self.host.also_wake = self.link.fileno()
        begun = time.monotonic()
        loaded = self.host.loaded()
        present = HostPresent(
            workers=workers,
            facts=facts_of(loaded),
            train_samples=loaded["train_samples"],
            eval_samples=loaded["eval_samples"],
        )
        self.link.tell(self.master, present)
        while not self._ended:
            if self.worker_group is None:
                select.select([self.link], [], [], 0.5)
                self._check_patience(begun)
            else:
                self._tick(self.worker_group)
            for heard in self.link.take():
                self._heard(heard)
            self._check_master()
        if self.worker_group is not None:
            self.worker_group.dismiss()

    def _tick(self, worker_group: Following) -> None:
        """Lead the workers for a moment, and report."""
        worker_group.listen()
        worker_group.history.drain()
        if not self._moved and worker_group.history.committed_at:
            self._moved = True
            self._tell_moved()
        for step, digest in worker_group.history.marks.items():
            self.link.tell(self.master, StepRecorded(step=step, digest=digest))
        worker_group.history.marks.clear()
        recovered = worker_group.failures.recovered(worker_group.history.committed_at)
        if recovered:
            self.link.tell(self.master, Recovered(recoveries=recovered))
        while self.mesh.troubles:
            trouble = self.mesh.troubles.popleft()
            self._trouble(trouble.generation, trouble.peer, trouble.why)
        if not self._ready and worker_group.members.complete:
            self._ready = True  # only now: nobody is held up while workers start
            self.link.tell(self.master, HostReady(workers=worker_group.plan.workers))
        status = worker_group.stands()
        if status is not None:
            paused = HostPaused(generation=self.mesh.generation, status=status)
            self.link.tell(self.master, paused)
        self._do_asked(worker_group)
        worker_group.grant()
        worker_group.watch()

    def _do_asked(self, worker_group: Following) -> None:
        """Do what was asked for, if everybody rests where it was to be done. What the master has
        not waited for is done with."""
        while self._asked and self._asked[0].step < worker_group.step:
            self._asked.popleft()
        while self._asked and worker_group.rests_at(self._asked[0].step):
            asked = self._asked.popleft()
            if isinstance(asked, SendState):
                worker_group.give(self.master)
            else:
                self._infer(worker_group, asked)

    def _infer(self, worker_group: Following, asked: InferBatches) -> None:
        """Do this host's part of a round of held-out batches, and send what comes of each."""
        results = worker_group.evaluation.divide(asked.what, asked.batches)
        for batch, result in zip(asked.batches, results, strict=True):
            for chunk in in_chunks(asked.round, batch, result):
                self.link.tell(self.master, chunk)

    def _trouble(self, generation: int, peer: str, why: str) -> None:
        trouble = ExchangeTrouble(generation=generation, other=peer, why=why)
        self.link.tell(self.master, trouble)

    def _heard(self, heard: Heard) -> None:
        if heard.peer != self.master or self._ended:  # what follows the end is a goodbye
            return
        if heard.message is None:
            assert heard.error is not None
            raise heard.error
        self._do(heard.message)

    def _do(self, message: Message) -> None:
        match message:
            case PlanAssigned(plan=plan) if self.worker_group is None:
                self._set_up(_parse_plan(self.master, plan))
            case HostRefused(error=refusal):
                error = refusal.error()
                raise RefusedError(error.what, expected=error.expected, found=error.found)
            case JobEnded():
                self._ended = True
            case _ if self.worker_group is None:
                raise ProtocolError(
                    f"host {self.master} has sent {type(message).__name__} before a plan"
                )
            case _:
                self._lead(self.worker_group, message)

    def _lead(self, worker_group: Following, message: Message) -> None:
        """Do as the master says, once there are workers."""
        match message:
            case PauseWorkers(generation=generation):
                self._asked = deque(each for each in self._asked if not isinstance(each, SendState))
                worker_group.hold(generation)
            case ResumeWorkers(order=order, lease=lease):
                worker_group.leased = lease
                worker_group.arrange(order)
            case LeaseExtended(step=step):
                worker_group.leased = step
                worker_group.grant()
            case InferBatches() | SendState():
                self._asked.append(message)
            case _:
                raise ProtocolError(
                    f"host {self.master} has sent {type(message).__name__} a second time"
                )

    def _set_up(self, plan: Plan) -> None:
        self.host.set_up(plan, networked=True)
        self.worker_group = Following(self.host, plan, Forward(self), None, mesh=self.mesh)
        self.worker_group.agent = self
        self.worker_group.decide(membership.GroupStarted())

    def _check_master(self) -> None:
        silent = self.link.silent_for(self.master)
        if silent > self._silent_seconds:
            raise PeerTimeoutError(
                f"host {self.master}, which coordinates the job, is silent",
                expected=f"a sign of life within {self._silent_seconds:g} s",
                found=f"none for {silent:.1f} s",
                fix="resume the run where its folder is",
            )

    def _check_patience(self, begun: float) -> None:
        if time.monotonic() - begun > PLAN_SECONDS:
            raise PeerTimeoutError(
                f"host {self.master} has sent no plan", expected=f"one within {PLAN_SECONDS:.0f} s"
            )


def _parse_plan(master: str, message: Mapping[str, Any]) -> Plan:
    try:
        return Plan.from_message(message)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProtocolError(
            f"host {master} has sent a plan that is none", found=ascii(str(error))[:200]
        ) from error


def _await_end(link: ControlLink) -> None:
    """Wait a moment for the master to take note of why this host cannot go on."""
    limit = time.monotonic() + 2.0
    while time.monotonic() < limit:
        select.select([link], [], [], 0.1)
        if any(
            heard.message is None or isinstance(heard.message, JobEnded) for heard in link.take()
        ):
            return


class Following(WorkerGroup):
    """A crew that goes as far as its master says."""

    agent: Agent
    leased = 0

    def _lease(self) -> int:
        return self.leased

    def rests_at(self, step: int) -> bool:
        """Whether everybody rests, with the state after so many steps."""
        return (
            not self.members.regrouping
            and self.members.all_rest
            and len(self._idle) == len(self.members.formed)
            and self.step == step
        )

    def _torn(self, why: str) -> None:
        assert self.mesh is not None
        self.agent._trouble(self.mesh.generation, "", why)


class Forward(NullObserver):
    """Keeps nothing, and forwards to the master what people may want to know."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent

    def event(self, name: str, **fields: object) -> None:
        self.agent.link.tell(self.agent.master, EventForwarded(name=name, fields=fields))
