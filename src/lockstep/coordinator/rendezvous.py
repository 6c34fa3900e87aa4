"""Rendezvous: hosts come to a job, are compared, get the plan, and become ready.

A host comes with its facts, which are compared with the master's, receives its part of the plan,
and is ready when its workers have started. Before the run the master waits for the hosts that it
knows of; others may come at any time.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence

from lockstep.agent.host_messages import (
    PROBE_BYTES,
    AgentFailed,
    HostMeasured,
    HostPresent,
    HostReady,
    HostRefused,
    JobEnded,
    LinkProbe,
    LinkProbed,
    MeasureHost,
    PlanAssigned,
)
from lockstep.agent.job_offer import JobOffer
from lockstep.agent.local_host import LocalHost
from lockstep.coordinator.host_membership import in_order
from lockstep.coordinator.launcher import Launcher
from lockstep.errors import (
    JobError,
    LockstepError,
    PeerTimeoutError,
    RefusedError,
)
from lockstep.net.control_link import ControlLink
from lockstep.net.handshake import check_facts
from lockstep.net.transport import Heard
from lockstep.planning.candidates import Link
from lockstep.planning.data_partition import Samples, check_open
from lockstep.planning.ownership import Ownership
from lockstep.planning.plan import Plan
from lockstep.planning.shard_placement import share
from lockstep.planning.teams import most_partners
from lockstep.state.host_memory import HostMemory
from lockstep.system import machine
from lockstep.system.messages import ErrorMessage, Message

GATHER_SECONDS = 600.0
"""How long hosts that are known of may take to load the task and its data."""
PROBES, MOST_PROBES = 5, 64
PROBE_SECONDS, LINK_SECONDS = 0.1, 60.0
"""How long probes travel for a rate to be taken of them, and how long they may."""
MAX_REPORTS = 10_000
"""That wait to be looked at."""


class Rendezvous:
    """The hosts of a job as they come. All calls come from the master's thread."""

    def __init__(
        self,
        link: ControlLink,
        launcher: Launcher,
        facts: Mapping[str, str],
        samples: Samples,
        ownership: Ownership,
    ) -> None:
        """`facts` are what all hosts must have in common; `samples` is what the master's has."""
        self.link, self._launcher, self._facts = link, launcher, facts
        self.ownership = ownership
        self.master = launcher.identity.node
        self.capacities = {self.master: launcher.workers or machine.cores()}
        """By host, how many workers it would run. The master's own is the first."""
        self._samples = {self.master: samples}
        self.ready: dict[str, int] = {}
        """By host that has been set up, how many workers it runs."""
        self.reports: deque[tuple[str, str]] = deque(maxlen=MAX_REPORTS)
        """Connections that were closed or refused: who, and why."""
        self._plan: Plan | None = None
        self._measured: dict[str, HostMeasured] = {}
        self._probed: dict[str, int] = {}
        """By host, the last probe of its link that it has told of."""
        self._expected: tuple[str, ...] = ()
        """The hosts that were there when the job was offered."""

    @property
    def samples(self) -> dict[str, Samples]:
        """By host, how many samples it has; in the order in which hosts share out shards."""
        return {name: self._samples[name] for name in in_order(self._samples, self.master)}

    def _computing(self) -> dict[str, int]:
        names = self.ownership.computing(list(self.capacities))
        return {name: count for name, count in self.capacities.items() if name in names}

    def gather(self, offer: JobOffer) -> None:
        """Offer the job, and wait until the hosts that there are have loaded the task.

        Raises:
            LockstepError: one of them cannot take part; says why.
        """
        self._expected = self._launcher.offer(offer)
        self._await(self.capacities, "to load the task and its data")

    def measure_hosts(
        self, plans: Mapping[str, Plan], digest: str, *, all_sizes: bool
    ) -> dict[str, HostMeasured]:
        """What the job costs on other hosts, by the plan for each of them."""
        for name, plan in plans.items():
            message = MeasureHost(plan=plan.to_message(), job=digest, all_sizes=all_sizes)
            self.link.tell(name, message)
        self._measured = {}
        self._await(self._measured, "to measure what a shard takes", plans)
        return self._measured

    def measure_link(self, name: str) -> Link:
        """The latency and the rate of the link to a host, as messages move on it."""
        times = [self._probe(name, 1, 0) for _ in range(PROBES)]
        there_and_back = min(times)
        count = 1
        while True:
            taken = self._probe(name, count, PROBE_BYTES) - there_and_back
            if taken > PROBE_SECONDS or count >= MOST_PROBES:
                break
            count *= 4
        rate = count * PROBE_BYTES / max(taken, 1e-6)
        return Link(latency=there_and_back / 2, rate=rate)

    def _probe(self, name: str, count: int, nbytes: int) -> float:
        """Seconds until a host has told of so many probes."""
        begun, self._probed[name] = time.monotonic(), 0
        for number in range(1, count + 1):
            self.link.tell(name, LinkProbe(number=number, content=bytes(nbytes)))
        while self._probed[name] < count:
            for heard in self.hear(0.2):
                self._heard(heard)
            if not self.knows(name) or time.monotonic() - begun > LINK_SECONDS:
                raise PeerTimeoutError(
                    f"host {name} did not answer in time",
                    expected=f"{count} probes within {LINK_SECONDS:.0f} s",
                )
        return time.monotonic() - begun

    def leave_out(self, name: str) -> None:
        """Let a host go: the job is quicker without it."""
        self.link.tell(name, JobEnded())
        self._expected = tuple(each for each in self._expected if each != name)
        self.lost(name)

    def share_out(self, workers: int) -> dict[str, int]:
        """How many workers each host gets. Hosts that compute nothing run as many as they would.

        Raises:
            JobError: some host would have none, or a server is not there.
        """
        capacities = self._computing()
        if self.ownership.together:  # each worker has a partner on each host
            capacities = dict.fromkeys(capacities, 1)
        return {**self.capacities, **share(workers, capacities)}

    def check_servers(self, servers: Sequence[str]) -> None:
        """See that the hosts that a job names are there.

        Raises:
            JobError: one is not.
        """
        missing = sorted(set(servers) - self.capacities.keys())
        if missing:
            raise JobError(
                f"there is no host {', '.join(missing)} to be a server",
                expected=f"names among {', '.join(self.capacities)}",
                found=", ".join(servers),
                fix="correct `servers`, or start that host",
            )

    def set_up(self, plan: Plan, host: LocalHost) -> tuple[Plan, HostMemory]:
        """Have every host, `host` is the master's own, allocate what the plan needs, and the others
        start their workers; returns the plan and the memory of the master's own."""
        self._plan = plan
        workers = self.share_out(plan.workers)
        for name in self.capacities:
            if name != self.master:
                self._set_up(name, workers[name])
        own = plan.for_host(self.master, workers[self.master])
        memory = host.set_up(own, networked=True)
        self._await(self.ready, "to set up its memory")
        return own, memory

    def present(self, name: str, message: HostPresent, *, running: bool) -> None:
        """A host has loaded the task.

        Raises:
            RefusedError: it differs from the others, or has come too late.
        """
        try:
            check_facts(self._facts, message.facts, name)
            if self._plan is not None:
                check_open(self._plan.holdings, name)
        except RefusedError as error:
            self.link.tell(name, HostRefused(error=ErrorMessage.of(error)))
            raise
        self._samples[name] = (message.train_samples, message.eval_samples)
        self.capacities[name] = message.workers
        if self._plan is not None and self.ownership.together:
            most = most_partners(self._plan.slices, self._plan.shards)
            self.capacities[name] = min(message.workers, most)
        if running:
            self._set_up(name, self.capacities[name])

    def is_ready(self, name: str, message: HostReady) -> int:
        """A host's workers have started; how many."""
        self.ready[name] = message.workers
        return message.workers

    def knows(self, name: str) -> bool:
        """Whether a host has loaded the task, and may take part."""
        return name in self.capacities

    def lost(self, name: str) -> None:
        """A host is gone."""
        self.capacities.pop(name, None)
        self._samples.pop(name, None)
        self.ready.pop(name, None)

    def reported(self) -> list[tuple[str, str]]:
        """The connections that were closed or refused since the last call: who, and why."""
        return [self.reports.popleft() for _ in range(len(self.reports))]

    def hear(self, seconds: float) -> list[Heard]:
        """What hosts say within so many seconds."""
        select.select([self.link], [], [], seconds)
        return self.link.take()

    def _await(
        self, known: Mapping[str, object], what: str, wanted: Collection[str] | None = None
    ) -> None:
        """Return when hosts are known: those that are wanted, or all that are expected."""
        limit = time.monotonic() + GATHER_SECONDS
        while missing := sorted(set(self._expected if wanted is None else wanted) - known.keys()):
            if time.monotonic() > limit:
                raise PeerTimeoutError(
                    f"host {', '.join(missing)} did not answer in time",
                    expected=f"{what} within {GATHER_SECONDS:.0f} s",
                    fix="look at what its agent says, or let it leave the cluster",
                )
            for who, why in self.reported():
                if who in missing:
                    raise RefusedError(f"host {who} cannot take part", found=why)
            for heard in self.hear(0.2):
                self._heard(heard)

    def _heard(self, heard: Heard) -> None:
        """Take what a host says. The job waits for those that are expected, and fails with them;
        what becomes of others is only reported."""
        try:
            if heard.error is not None:
                raise heard.error
            assert heard.message is not None
            self._said(heard.peer, heard.message)
        except LockstepError as error:
            if heard.peer in self._expected:
                raise
            self.lost(heard.peer)
            self.reports.append((heard.peer, str(error)))

    def _said(self, name: str, message: Message) -> None:
        match message:
            case AgentFailed():
                raise about(name, message)
            case HostPresent():
                self.present(name, message, running=False)
            case HostMeasured() if self.knows(name):
                self._measured[name] = message
            case LinkProbed(number=number) if self.knows(name):
                self._probed[name] = number
            case HostReady() if self.knows(name):
                self.is_ready(name, message)

    def _set_up(self, name: str, workers: int) -> None:
        assert self._plan is not None
        plan = self._plan.for_host(name, workers)
        self.link.tell(name, PlanAssigned(plan=plan.to_message()))


def about(name: str, message: AgentFailed) -> LockstepError:
    """A host's error, with its name."""
    error = message.error.error()
    what = error.what if f"host {name}" in error.what else f"host {name}: {error.what}"
    return type(error)(what, expected=error.expected, found=error.found, fix=error.fix)
