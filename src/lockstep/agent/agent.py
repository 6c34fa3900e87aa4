"""Agent: takes part in a job on another host than the master's.

It loads the task, connects to the master, sets up its host's memory and workers, and then carries
out the master's orders until the job ends, or the master is lost.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lockstep.agent.followed_part import FollowedPart
from lockstep.agent.host_messages import (
    FROM_MASTER,
    AgentFailed,
    HostMeasured,
    HostPresent,
    HostRefused,
    JobEnded,
    LinkProbe,
    LinkProbed,
    MeasureHost,
    PlanAssigned,
)
from lockstep.agent.job_offer import JobOffer, without_contents
from lockstep.agent.local_host import LocalHost
from lockstep.agent.profiling import profile_job, profile_path
from lockstep.collectives.host_mesh import HostMesh
from lockstep.errors import (
    JobError,
    LockstepError,
    NetworkError,
    PeerTimeoutError,
    ProtocolError,
    RefusedError,
    ResourceError,
    disk_errors,
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
from lockstep.system import machine
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
    functions: bool = True,
    discreet: bool = False,
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
        functions: whether the task's name may lead to a function that is called.
        discreet: whether the master is told nothing of files that are read here.

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
                functions=functions,
            )
            settings = dict(offer.settings)
            records = None if offer.records is None else offer.records.as_request()
            with _fetched_data(link, offer, silence) as data:
                local = LocalHost.start(
                    source, settings, records, networked=True, data=data, name=identity.node
                )
            stack.enter_context(local)
            patience = offer.settings.get("exchange_seconds")
            mesh = HostMesh(
                identity, host, offer.job, report, link.wake, silence,
                None if patience is None else float(patience),
            )  # fmt: skip
            stack.callback(mesh.close)
            agent = Agent(local, link, mesh, offer.master, silence, moved)
            agent.run(workers)
        except NetworkError:
            raise
        except LockstepError as error:
            step = 0 if agent is None else agent.step
            said = without_contents(error) if discreet else error
            if discreet:
                report(identity.node, str(error))
            link.tell(offer.master, AgentFailed(error=ErrorMessage.of(said), step=step))
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
    with disk_errors("the code that the master sends", "let this host take the job again"):
        unpack(bytes(data), folder)
    return str(folder)


@contextlib.contextmanager
def _fetched_data(link: ControlLink, offer: JobOffer, silence: float) -> Iterator[Segment | None]:
    """The data sets or the records that the master sends, in memory, if it does."""
    if offer.data is None:
        yield None
        return
    machine.check_available("the data that the master sends", offer.data.nbytes)
    with contextlib.closing(Segment.create("data", offer.data.nbytes, at_once=False)) as segment:
        with memoryview(segment.map)[: segment.nbytes] as content:
            fetch(link, offer.master, "data", offer.data, content, silence, segment.reserve)
        yield segment


def facts_of(loaded: Mapping[str, Any]) -> dict[str, str]:
    """What has to be the same on all hosts, from what the forkserver knows of its task."""
    facts = gather(**{name: loaded[name] for name in ("probe", "code", "data", "fitted")})
    return facts | {"compiler": loaded["compiler"]} if "compiler" in loaded else facts


class Agent:
    """One host's part in a job, from the task's loading to the job's end."""

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
        self._part: FollowedPart | None = None
        """None: the plan has not come yet."""
        self._ended = False
        self._moved = moved

    @property
    def step(self) -> int:
        """How many steps are committed and recorded."""
        return 0 if self._part is None else self._part.group.step

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
            if self._part is None:
                select.select([self.link], [], [], 0.5)
                self._check_plan_time(begun)
            else:
                self._part.tick()
            for heard in self.link.take():
                self._heard(heard)
            self._check_master()
        if self._part is not None:
            self._part.group.dismiss()

    def _heard(self, heard: Heard) -> None:
        if heard.peer != self.master or self._ended:  # what follows the end is a goodbye
            return
        if heard.message is None:
            assert heard.error is not None
            raise heard.error
        self._do(heard.message)

    def _do(self, message: Message) -> None:
        match message:
            case LinkProbe(number=number) if self._part is None:
                self.link.tell(self.master, LinkProbed(number=number))
            case MeasureHost() if self._part is None:
                self._measure(message)
            case PlanAssigned() if self._part is None:
                self._set_up(message)
            case HostRefused(error=refusal):
                error = refusal.error()
                raise RefusedError(error.what, expected=error.expected, found=error.found)
            case JobEnded():
                self._ended = True
            case _ if self._part is None or isinstance(message, PlanAssigned):
                raise ProtocolError(
                    f"host {self.master} has sent {type(message).__name__}",
                    expected="a plan, once, and then orders",
                )
            case _:
                self._part.do(message)

    def _set_up(self, message: PlanAssigned) -> None:
        """Allocate what the plan needs, and start workers.

        Raises:
            ProtocolError: it is no plan.
        """
        plan = self._plan_of(message.plan)
        memory = self.host.set_up(plan, networked=True)
        self._part = FollowedPart(
            self.host, memory, plan, self.link, self.mesh, self.master, self._moved
        )

    def _plan_of(self, message: Mapping[str, Any]) -> Plan:
        try:
            return Plan.from_message(message)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProtocolError(
                f"host {self.master} has sent a plan that is none", found=ascii(str(error))[:200]
            ) from error

    def _measure(self, message: MeasureHost) -> None:
        """Tell what the job costs here. What cannot be measured, the run will tell of."""
        plan, found = self._plan_of(message.plan), None
        memory = machine.available_bytes()
        with contextlib.suppress(ResourceError):
            path = profile_path(message.job, plan)
            found = profile_job(self.host, plan, path, all_sizes=message.all_sizes)
        self.link.tell(self.master, HostMeasured(profile=found, memory=memory))

    def _check_master(self) -> None:
        silent = self.link.silent_for(self.master)
        if silent > self._silent_seconds:
            raise PeerTimeoutError(
                f"host {self.master}, which coordinates the job, is silent",
                expected=f"a sign of life within {self._silent_seconds:g} s",
                found=f"none for {silent:.1f} s",
                fix="resume the run where its folder is",
            )

    def _check_plan_time(self, begun: float) -> None:
        if time.monotonic() - begun > PLAN_SECONDS:
            raise PeerTimeoutError(
                f"host {self.master} has sent no plan", expected=f"one within {PLAN_SECONDS:.0f} s"
            )


def _await_end(link: ControlLink) -> None:
    """Wait a moment for the master to take note of why this host cannot go on."""
    limit = time.monotonic() + 2.0
    while time.monotonic() < limit:
        select.select([link], [], [], 0.1)
        if any(
            heard.message is None or isinstance(heard.message, JobEnded) for heard in link.take()
        ):
            return
