"""Open hosts: the hosts of a job before it runs. They load the task, and are set up for a plan.

    open_hosts -> OpenHosts, which have loaded -> initialise(plan) -> ReadyHosts -> a HostGroup

`SingleHost` is this machine alone; `NetworkHosts` are this one and those that a launcher brings.
"""

from __future__ import annotations

import contextlib
import mmap
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lockstep.agent.agent import facts_of
from lockstep.agent.host_messages import FROM_AGENTS, HostMeasured, JobEnded
from lockstep.agent.host_regroup import HostRegroup
from lockstep.agent.job_offer import JobOffer, RecordsRequest
from lockstep.agent.local_host import LocalHost
from lockstep.agent.worker_group import WorkerGroup
from lockstep.collectives.host_mesh import HostMesh
from lockstep.coordinator.host_group import HostGroup
from lockstep.coordinator.launcher import Launcher
from lockstep.coordinator.network_host_group import NetworkHostGroup
from lockstep.coordinator.rendezvous import Rendezvous
from lockstep.coordinator.single_host_group import SingleHostGroup
from lockstep.errors import JobError
from lockstep.job.code_archive import Archive, pack
from lockstep.job.job import Job
from lockstep.job.run_request import RunRequest
from lockstep.job.slice_words import several_hosts
from lockstep.job.task_source import TaskSource
from lockstep.net.blob_transfer import BlobInfo, BlobServer
from lockstep.net.control_link import ControlLink
from lockstep.net.tcp_transport import TcpTransport
from lockstep.net.transport import ignore
from lockstep.planning.candidates import Link
from lockstep.planning.data_partition import Samples, check_same, check_together
from lockstep.planning.ownership import ownership_of
from lockstep.planning.plan import Plan
from lockstep.state.host_memory import HostMemory
from lockstep.system import machine


@dataclass(frozen=True, kw_only=True)
class ReadyHosts:
    """Hosts whose memory is allocated."""

    host: LocalHost
    """The master's own."""
    memory: HostMemory
    own_plan: Plan
    """The part of the master's own host."""
    networked: bool
    lead: Callable[[WorkerGroup], HostGroup]
    """Makes the host group, of the worker group of the master's own host."""


class OpenHosts(Protocol):
    """The hosts of a job, with the task loaded."""

    job: Job
    """Complete, with the recipe's settings."""
    host: LocalHost
    """The master's own."""
    networked: bool
    """Whether other hosts take part, or may."""

    @property
    def capacities(self) -> Mapping[str, int]:
        """By host, how many workers it would run. The master's own is the first."""

    @property
    def samples(self) -> Mapping[str, Samples]:
        """By host, how many samples it has."""

    def measure(
        self, plans: Mapping[str, Plan], digest: str, *, all_sizes: bool
    ) -> dict[str, tuple[HostMeasured, Link]]:
        """What the job costs on other hosts, by the plan for each, and their links to this one."""

    def leave_out(self, name: str) -> None:
        """Let a host go before the job begins."""

    def initialise(self, plan: Plan) -> ReadyHosts:
        """Have every host allocate what the plan needs."""


@contextlib.contextmanager
def open_hosts(
    request: RunRequest, on: Launcher | None, records: Mapping[str, Any] | None = None
) -> Iterator[OpenHosts]:
    """Have this host load a task, and offer the job to those that `on` brings, if any.

    `records`, `{"path", "keep"}`, names a file that takes the place of the task's data, to predict
    from; other hosts are sent its bytes.

    Raises:
        JobError: the task was handed over as an object, which does not travel.
        LockstepError: the task cannot be loaded, or a host cannot take part.
    """
    name = "" if on is None else on.identity.node
    with LocalHost.start(
        request.source, dict(request.given), records, networked=on is not None, name=name
    ) as host:
        job = request.completed(host.loaded()["settings"])
        check_together(job.data, alone=on is None)
        if on is not None and job.device != "cpu":
            raise JobError(
                f"device: {job.device} is for one host so far",
                expected="a job without --on, or device = cpu",
                found=f"device = {job.device} and other hosts",
                fix="leave one out",
            )
        if on is not None and job.team > 1:
            raise several_hosts(job.team, "other hosts")
        if on is None:
            yield SingleHost(job, host)
            return
        with (
            _data_of(host, records) as data,
            NetworkHosts(on, request.source, job, host) as hosts,
        ):
            hosts.gather(dict(request.given), data, records)
            yield hosts


class SingleHost:
    """This machine alone."""

    networked = False

    def __init__(self, job: Job, host: LocalHost) -> None:
        self.job, self.host = job, host

    @property
    def capacities(self) -> Mapping[str, int]:
        return {self.host.name: machine.cores()}

    @property
    def samples(self) -> Mapping[str, Samples]:
        return {self.host.name: samples_of(self.host)}

    def measure(
        self, plans: Mapping[str, Plan], digest: str, *, all_sizes: bool
    ) -> dict[str, tuple[HostMeasured, Link]]:
        return {}

    def leave_out(self, name: str) -> None:
        raise NotImplementedError("a host that is alone takes part")

    def initialise(self, plan: Plan) -> ReadyHosts:
        return ready_alone(self.host, plan)


def ready_alone(host: LocalHost, plan: Plan) -> ReadyHosts:
    """A host that is set up for a plan of its own."""
    memory = host.set_up(plan)
    return ReadyHosts(
        host=host, memory=memory, own_plan=plan, networked=False, lead=lambda _: SingleHostGroup()
    )


def samples_of(host: LocalHost) -> Samples:
    """How many samples a host that has loaded its task has."""
    return host.facts["train_samples"], host.facts["eval_samples"]


class NetworkHosts:
    """This machine and those that a launcher brings. Agents end when it is closed."""

    networked = True

    def __init__(self, launcher: Launcher, source: TaskSource, job: Job, host: LocalHost) -> None:
        """Listen for the agents of a job.

        Raises:
            JobError: the task was handed over as an object, or its code cannot be sent.
        """
        self._task, self._archive = _travelling(source, ship_code=job.ship_code)
        self._launcher, self.job, self.host = launcher, job, host
        self._args = dict(source.args)
        self._name = f"{source.label}-{secrets.token_hex(8)}"
        ownership = ownership_of(job.ownership, job.servers, job.compression, job.local_steps)

        def report(who: str, why: str) -> None:
            self._rendezvous.reports.append((who, why))

        self._transport = TcpTransport(
            launcher.identity, job=self._name, facts={}, host=launcher.host, report=report,
            answer=True, silence=job.host_seconds, codec=FROM_AGENTS,
        )  # fmt: skip
        self._blobs = BlobServer(self._transport)
        """What other hosts may fetch."""
        self._link = ControlLink(self._transport, self._blobs.serve)
        self._rendezvous = Rendezvous(
            self._link, launcher, facts_of(host.facts), samples_of(host), ownership
        )
        launcher.report = report
        self._mesh = HostMesh(
            launcher.identity, launcher.host, self._name, report, self._link.wake,
            job.host_seconds, job.exchange_seconds,
        )  # fmt: skip

    def __enter__(self) -> NetworkHosts:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of everybody, however the run has ended."""
        for name in self._transport.peers:
            self._link.tell(name, JobEnded())  # else agents would take the master for lost
        self._launcher.close()
        self._launcher.report = ignore  # the launcher may stay, and would keep all of this
        self._mesh.close()
        self._transport.close()
        self._link.close()
        self._blobs.close()

    @property
    def capacities(self) -> Mapping[str, int]:
        return self._rendezvous.capacities

    @property
    def samples(self) -> Mapping[str, Samples]:
        return self._rendezvous.samples

    def measure(
        self, plans: Mapping[str, Plan], digest: str, *, all_sizes: bool
    ) -> dict[str, tuple[HostMeasured, Link]]:
        """What the job costs on other hosts, by the plan for each, and their links to this one.

        Raises:
            LockstepError: one of them does not answer.
        """
        links = {name: self._rendezvous.measure_link(name) for name in plans}
        found = self._rendezvous.measure_hosts(plans, digest, all_sizes=all_sizes)
        return {name: (found[name], links[name]) for name in plans}

    def leave_out(self, name: str) -> None:
        """Let a host go before the job begins."""
        self._rendezvous.leave_out(name)

    def gather(
        self,
        settings: dict[str, Any],
        data: memoryview | None,
        records: Mapping[str, Any] | None,
    ) -> None:
        """Offer the job, and wait until the hosts that there are have loaded the task.

        `data` are bytes that they need besides: data sets, or the file that `records` names.

        Raises:
            LockstepError: one of them cannot take part; says why.
        """
        code = self._archive
        if data is not None:
            self._blobs.put("data", data)
        if code is not None:
            self._blobs.put("code", code.data)
        self._rendezvous.gather(
            JobOffer(
                job=self._name,
                master=self.host.name,
                address=self._transport.address,
                task=self._task,
                args=self._args,
                settings={
                    **settings,
                    "host_seconds": self.job.host_seconds,
                    "exchange_seconds": self.job.exchange_seconds,
                },
                code=None if code is None else BlobInfo.of(code.data),
                data=None if data is None else BlobInfo.of(data),
                records=None if records is None else RecordsRequest(**records),
            )
        )
        self._rendezvous.check_servers(self.job.servers)

    def initialise(self, plan: Plan) -> ReadyHosts:
        """Have every host allocate what the plan needs, and the others start their workers.

        Raises:
            JobError, DataError: the plan does not fit the hosts.
        """
        if plan.holdings:
            check_same(plan.holdings, self.samples)
        own_plan, memory = self._rendezvous.set_up(plan, self.host)
        return ReadyHosts(
            host=self.host, memory=memory, own_plan=own_plan, networked=True, lead=self._lead
        )

    def _lead(self, group: WorkerGroup) -> HostGroup:
        return NetworkHostGroup(
            HostRegroup(group, self._mesh),
            self._rendezvous,
            self._link,
            self._transport,
            self.job.host_seconds,
        )


def _travelling(source: TaskSource, *, ship_code: bool) -> tuple[str, Archive | None]:
    """The task's name on other hosts, and its code if that is to be sent."""
    if source.payload is not None:
        raise JobError(
            "a task that is an object cannot be sent to other hosts",
            expected="a name that every host can resolve: a recipe, module:Task or file.py:Task",
            found=source.name,
            fix="put the task into a module or a file of its own",
        )
    if not ship_code:
        return source.name, None
    if ":" not in source.name:
        raise JobError(
            f"ship_code is set, but {source.name} is a recipe",
            expected="module:Task or file.py:Task",
            found="a part of Lockstep, which every host has",
            fix="leave out ship_code",
        )
    archive = pack(source.name)
    return archive.task, archive


@contextlib.contextmanager
def _data_of(host: LocalHost, records: Mapping[str, Any] | None) -> Iterator[memoryview | None]:
    """The bytes that other hosts need besides: the file of records, or the data sets, if these are
    to be sent."""
    if records is not None:
        with (
            open(records["path"], "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            memoryview(content) as view,
        ):
            yield view
    else:
        yield None if host.data is None else memoryview(host.data.map)[: host.data.nbytes]
