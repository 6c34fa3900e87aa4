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
from lockstep.agent.answer_chunks import in_pieces
from lockstep.agent.evaluation_rounds import Inferred
from lockstep.agent.job_offer import JobOffer
from lockstep.agent.local_host import LocalHost
from lockstep.agent.observer import NullObserver
from lockstep.agent.regroup_messages import RegroupOrder
from lockstep.agent.worker_group import WorkerGroup
from lockstep.collectives.host_mesh import HostMesh
from lockstep.errors import (
    JobError,
    LockstepError,
    NetworkError,
    PeerTimeoutError,
    ProtocolError,
    RefusedError,
    from_message,
    to_message,
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
            identity, job=offer.job, facts={}, host=host, silence=silence, report=report
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
            settings, records = dict(offer.settings), offer.records
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
            link.tell(offer.master, "failed", error=to_message(error), step=step)
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
        self._asked: deque[Mapping[str, Any]] = deque()
        """What is to be done when all rest: held-out batches, or the state to be given."""

    def run(self, workers: int) -> None:
        """Load the task, say that this host is there, and serve."""
        self.host.also_wake = self.link.fileno()
        begun = time.monotonic()
        loaded = self.host.loaded()
        samples = [loaded["train_samples"], loaded["eval_samples"]]
        facts = facts_of(loaded)
        self.link.tell(self.master, "present", workers=workers, facts=facts, samples=samples)
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
            self.link.tell(self.master, "recorded", step=step, digest=digest)
        worker_group.history.marks.clear()
        recovered = worker_group.failures.recovered(worker_group.history.committed_at)
        if recovered:
            self.link.tell(self.master, "recovered", recoveries=recovered)
        while self.mesh.troubles:
            trouble = self.mesh.troubles.popleft()
            self._trouble(trouble.generation, trouble.peer, trouble.why)
        if not self._ready and worker_group.members.complete:
            self._ready = True  # only now: nobody is held up while workers start
            self.link.tell(self.master, "ready", workers=worker_group.plan.workers)
        standing = worker_group.stands()
        if standing is not None:
            self.link.tell(
                self.master,
                "stood",
                generation=self.mesh.generation,
                standing=standing.to_message(),
            )
        self._do_asked(worker_group)
        worker_group.grant()
        worker_group.watch()

    def _do_asked(self, worker_group: Following) -> None:
        """Do what was asked for, if everybody rests where it was to be done. What the master has
        not waited for is done with."""
        while self._asked and self._asked[0]["step"] < worker_group.step:
            self._asked.popleft()
        while self._asked and worker_group.rests_at(self._asked[0]["step"]):
            asked = self._asked.popleft()
            if asked["op"] == "give":
                worker_group.give(self.master)
            else:
                self._infer(worker_group, asked["op"], asked)

    def _infer(self, worker_group: Following, what: Inferred, asked: Mapping[str, Any]) -> None:
        """Do this host's part of a round of held-out batches, and send what comes of each."""
        batches = [int(batch) for batch in asked["batches"]]
        for batch, result in zip(
            batches, worker_group.evaluation.divide(what, batches), strict=True
        ):
            for piece in in_pieces(batch, result):
                self.link.tell(self.master, "batch", round=asked["round"], **piece)

    def _trouble(self, generation: int, peer: str, why: str) -> None:
        self.link.tell(self.master, "trouble", generation=generation, other=peer, why=why)

    def _heard(self, heard: Heard) -> None:
        if heard.peer != self.master or self._ended:  # what follows the end is a goodbye
            return
        if heard.message is None:
            assert heard.error is not None
            raise heard.error
        try:
            self._do(heard.message)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProtocolError(
                f"host {self.master} has sent an order that says nothing",
                found=ascii(error)[:200],
            ) from error

    def _do(self, message: Mapping[str, Any]) -> None:
        match message["op"]:
            case "set_up":
                self._set_up(Plan.from_message(message["plan"]))
            case "hold":
                assert self.worker_group is not None
                self._asked = deque(item for item in self._asked if item["op"] != "give")
                self.worker_group.hold(message["generation"])
            case "arrange":
                assert self.worker_group is not None
                self.worker_group.leased = message["lease"]
                self.worker_group.arrange(RegroupOrder.from_message(message))
            case "lease":
                assert self.worker_group is not None
                self.worker_group.leased = message["step"]
                self.worker_group.grant()
            case "refused":
                error = from_message(message["error"])
                raise RefusedError(error.what, expected=error.expected, found=error.found)
            case "evaluate" | "predict" | "give":
                self._asked.append(message)
            case "end":
                self._ended = True

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


def _await_end(link: ControlLink) -> None:
    """Wait a moment for the master to take note of why this host cannot go on."""
    limit = time.monotonic() + 2.0
    while time.monotonic() < limit:
        select.select([link], [], [], 0.1)
        if any(heard.message is None or heard.message.get("op") == "end" for heard in link.take()):
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
        self.agent.link.tell(self.agent.master, "event", name=name, fields=fields)
