"""Network host group: several hosts led through a job; `host_membership` decides, here is the I/O.

Agents have come and are set up (`rendezvous`). From here on they are paused and resumed together,
like the master's own worker group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from lockstep.agent.host_messages import (
    AgentFailed,
    EventForwarded,
    ExchangeTrouble,
    HostPaused,
    HostPresent,
    HostReady,
    JobEnded,
    LeaseExtended,
    MetricEvaluated,
    PauseWorkers,
    Recovered,
    ResumeWorkers,
    StepRecorded,
)
from lockstep.agent.host_regroup import HostRegroup
from lockstep.agent.regroup_messages import HostStatus, RegroupOrder
from lockstep.coordinator import host_membership
from lockstep.coordinator.divergence_check import DivergenceCheck
from lockstep.coordinator.host_inbox import HostInbox, Overdue
from lockstep.coordinator.host_membership import HostMembership
from lockstep.coordinator.network_evaluation_share import NetworkEvaluationShare
from lockstep.coordinator.parts_collector import PartsCollector
from lockstep.coordinator.rendezvous import Rendezvous, about
from lockstep.errors import (
    NetworkError,
    ProtocolError,
    RefusedError,
    ResourceError,
    WorkerLostError,
)
from lockstep.net.control_link import ControlLink
from lockstep.net.counted_report import CountedReport
from lockstep.net.tcp_transport import TcpTransport
from lockstep.net.transport import Heard
from lockstep.planning.data_partition import check_whole
from lockstep.planning.metric_decisions import Told
from lockstep.system.messages import Message, printable

MAX_REFUSALS = 20
"""Of one host, in a minute, that are told of one by one."""


class NetworkHostGroup:
    """The hosts of a job, with the master's own worker group among them."""

    def __init__(
        self,
        regroup: HostRegroup,
        rendezvous: Rendezvous,
        link: ControlLink,
        transport: TcpTransport,
        silent_seconds: float,
    ) -> None:
        """Lead the hosts of a rendezvous.

        Args:
            regroup: the master's own host.
            rendezvous: the hosts that have come, and those that will.
            link: what all of them listen to.
            transport: drops a host that is given up.
            silent_seconds: after so many seconds without a sign of life a host is lost.
        """
        group = regroup.group
        self._regroup, self._group, self._rendezvous = regroup, group, rendezvous
        self._link, self._transport, self._master = link, transport, group.host.name
        self._inbox = HostInbox(link, silent_seconds)
        self._resting = Overdue()
        """For how long other hosts have not come to rest, while the master's own rests."""
        self._membership = HostMembership(master=self._master, whole=group.role.ownership.whole)
        self._connections = CountedReport(
            lambda who, why: group.observer.event("connection", peer=who, why=why)
        )
        self._refusals = CountedReport(
            lambda who, why: group.observer.event("refused", host=who, why=why), MAX_REFUSALS
        )
        self._statuses: dict[str, HostStatus] = {}
        self._newcomers: dict[str, int] = {}
        """Hosts that wait to be let in, with their workers: where none has the whole state, they
        come in when the snapshot is up to date."""
        self._leased = self._furthest = -1
        self._divergence = DivergenceCheck()
        self._troubled_at = -1
        """The step at which hosts last had trouble with each other."""
        self._paused_at = 0.0
        """Since when hosts have been paused without a step in between; 0: they run."""
        self.share = NetworkEvaluationShare(
            group,
            self._inbox,
            link,
            transport,
            workers=lambda: {name: each.workers for name, each in self._membership.members.items()},
            observe=self._observe,
            check_ended=self._check_ended,
            lost=lambda name, why: self._decide([host_membership.HostLost(name, why)]),
            limit=regroup.exchange_limit,
            troubled=lambda: bool(regroup.mesh.troubles),
        )
        self.parts = PartsCollector(
            regroup, self._inbox, link, lambda: bool(self._newcomers), self._observe
        )

    def stop_wanted(self, wanted: Callable[[], bool]) -> None:
        self._regroup.mesh.hurried = wanted

    def begin(self) -> None:
        self._group.host.also_wake = self._link.fileno()
        present = {self._master: self._group.plan.workers, **self._rendezvous.ready}
        self._decide([host_membership.HostReady(*host) for host in present.items()])

    def look(self) -> None:
        group, events = self._group, list[host_membership.Event]()
        if self._regroup.mesh.hurried() and not self._membership.hurried:
            events.append(host_membership.StopWanted())
        for who, why in self._rendezvous.reported():
            self._connections(who, why)
        self._connections.flush()
        self._refusals.flush()
        for heard in self._inbox.take():
            events += self._heard(heard)
        events += self._silences(self._membership.members)
        events += self._own_news()
        events += self._restless()
        self._divergence.check(self._master, group.step_log)
        self._note_stall()
        if self._membership.troubles and group.step > self._troubled_at:
            events.append(host_membership.StepsCommitted())
        self._decide(events)

    def lease(self, step: int) -> None:
        if step != self._leased:
            self._leased = step
            self._furthest = max(self._furthest, step)
            for name in self._others():
                self._link.tell(name, LeaseExtended(step=step))

    def tell_metric(self, told: Told) -> None:
        for name in self._others():
            self._link.tell(name, MetricEvaluated(told=told))

    def let_in(self) -> None:
        waiting, self._newcomers = self._newcomers, {}
        self._decide([host_membership.HostReady(*host) for host in waiting.items()])

    def end(self) -> None:
        self._connections.flush(at_once=True)
        self._refusals.flush(at_once=True)
        for name in self._transport.peers:
            self._link.tell(name, JobEnded())

    def _others(self) -> list[str]:
        """All hosts of the run but the master's own."""
        return [name for name in self._membership.members if name != self._master]

    # What has happened, as events for the membership.

    def _own_news(self) -> list[host_membership.Event]:
        """What has become of the master's own host."""
        self._regroup.report_corruption()
        troubles = self._regroup.mesh.troubles
        events: list[host_membership.Event] = []
        while troubles:
            trouble = troubles.popleft()
            events.append(
                host_membership.ExchangeFailed(
                    self._master, trouble.generation, trouble.peer, trouble.why
                )
            )
        status = self._regroup.status()
        if status is not None:
            generation = self._membership.generation
            events.append(host_membership.HostPaused(self._master, generation, status))
        return events

    def _silences(self, names: Iterable[str]) -> list[host_membership.Event]:
        """The losses of those that have given no sign of life for too long."""
        return [
            host_membership.HostLost(
                name, f"no sign of life for {self._inbox.silent_for(name):.1f} s"
            )
            for name in names
            if name != self._master and self._inbox.is_silent(name)
        ]

    def _restless(self) -> list[host_membership.Event]:
        """The losses of those that have been told to come to rest, and do not for too long."""
        members, master = self._membership.members, self._master
        waits = self._membership.regrouping and members[master].status is not None
        awaited = [name for name in members if name != master and members[name].status is None]
        limit = self._regroup.exchange_limit()
        return [
            host_membership.HostLost(name, f"it has not come to rest for {seconds:.1f} s")
            for name, seconds in self._resting.look(awaited if waits else ()).items()
            if seconds > limit
        ]

    def _note_stall(self) -> None:
        """Record how long a regrouping has held up the job, once it goes on."""
        committed = self._group.step_log.committed_at
        if self._paused_at and committed > self._paused_at and not self._membership.regrouping:
            stalled = round((committed - self._paused_at) * 1e3, 2)
            self._group.observer.event(
                "regrouped", generation=self._membership.generation, stalled_ms=stalled
            )
            self._paused_at = 0.0

    def _heard(self, heard: Heard) -> list[host_membership.Event]:
        name, message = heard.peer, heard.message
        if message is None:
            self._rendezvous.lost(name)
            self._newcomers.pop(name, None)
            why = heard.error.found or heard.error.what if heard.error else "it has gone"
            known = name in self._membership.members
            return [host_membership.HostLost(name, why, closed=True)] if known else []
        try:
            return self._said(name, message)
        except ProtocolError as error:
            self._transport.drop(name, error.what)
            return [host_membership.HostLost(name, error.what)]

    def _said(self, name: str, message: Message) -> list[host_membership.Event]:
        """What a host says, as events. Of one that is no member only what leads it there counts.

        Raises:
            ProtocolError: it cannot be true.
            LockstepError: a member has failed.
        """
        observer, member = self._group.observer, name in self._membership.members
        match message:
            case HostPaused(generation=generation, status=status) if member:
                for step in (status.whole, status.snapshot):
                    self._check_step(name, step or 0, self._furthest_state())
                return [host_membership.HostPaused(name, generation, status)]
            case ExchangeTrouble(generation=generation, other=peer, why=why) if member:
                awaited = self._regroup.mesh.awaited
                why = printable(why)
                return [host_membership.ExchangeFailed(name, generation, peer, why, awaited)]
            case StepRecorded(step=step, digest=digest) if member:
                self._check_step(name, step)
                self._divergence.told(name, step, digest)
            case EventForwarded(name=event, fields=fields) if self._rendezvous.knows(name):
                observer.event(event, **{**fields, "host": name})
            case Recovered(recoveries=recoveries) if self._rendezvous.knows(name):
                observer.recovered([{**each, "host": name} for each in recoveries])
            case AgentFailed() if not member:  # it was to join; all go on
                self._refusals(name, str(about(name, message)))
            case AgentFailed() if self._lacks_something(message):
                self._transport.drop(name, "it cannot go on")
                return [host_membership.HostLost(name, message.error.error().what)]
            case AgentFailed(step=step):
                raise self._group.failure_log.raised(about(name, message), step)
            case HostPresent():
                try:
                    self._rendezvous.present(name, message, running=True)
                except RefusedError as refused:
                    self._refusals(name, refused.found)
            case HostReady() if self._rendezvous.knows(name):
                workers = self._rendezvous.is_ready(name, message)
                if self._membership.whole:
                    return [host_membership.HostReady(name, workers)]
                self._newcomers[name] = workers
        return []

    def _lacks_something(self, message: AgentFailed) -> bool:
        """Whether a host cannot go on, as if it had been killed, and others can: its processes are
        gone, or it lacks memory, descriptors or space."""
        return isinstance(message.error.error(), WorkerLostError | ResourceError)

    def _check_step(self, name: str, step: int, furthest: int | None = None) -> None:
        """Check that a host can have come so far; by default, as far as a lease went.

        Raises:
            ProtocolError: it cannot.
        """
        if furthest is None:
            furthest = max(self._furthest, self._group.control.lease, self._group.step)
        if step > furthest:
            raise ProtocolError(f"host {name} claims step {step}, and {furthest} is the furthest")

    def _furthest_state(self) -> int | None:
        """After how many steps another host's state can be: it needs the master's gradients for
        each. None: the master has no part in that, or no state of its own."""
        group = self._group
        if not group.has_state or not group.role.several or not group.role.shards:
            return None
        step, _ = group.in_flight_words()
        return max(step, group.step) + max(1, group.plan.local_steps)

    # While all rest: what can be dealt with at once, and what cannot.

    def _observe(self, heard: Heard) -> bool:
        """Deal with news for the observer; whether that was all of the message."""
        return isinstance(heard.message, EventForwarded | Recovered) and not self._heard(heard)

    def _check_ended(self, name: str) -> None:
        """Let the membership decide if something has ended this host's part.

        Raises:
            LockstepError: the host has failed.
        """
        ends = [
            heard
            for heard in self._inbox.kept
            if heard.peer == name
            and (heard.message is None or isinstance(heard.message, AgentFailed))
        ]
        events = [event for heard in ends for event in self._heard(heard)]
        self._decide(events + self._silences([name]))

    # What the membership commands.

    def _decide(self, events: list[host_membership.Event]) -> None:
        """Let the membership decide on what has happened, and carry its last word out."""
        last: host_membership.PauseHosts | host_membership.ResumeHosts | None = None
        for event in events:
            if isinstance(event, host_membership.HostPaused):
                self._statuses[event.name] = event.status
            self._membership, commands, reason = host_membership.decide(self._membership, event)
            if isinstance(event, host_membership.ExchangeFailed):
                self._troubled_at = self._group.step
            for command in commands:
                if isinstance(command, host_membership.AbandonHost):
                    self._abandon(command)
                    continue
                if isinstance(command, host_membership.GiveUp):
                    raise NetworkError(
                        f"the hosts of the job cannot exchange anything: {command.why}",
                        fix="look at the memory of the master's host; then resume the run",
                    )
                last = command
                going_on = isinstance(last, host_membership.ResumeHosts)
                self._group.observer.event(
                    "hosts", generation=self._membership.generation, reason=reason,
                    hosts=sorted(self._membership.members), going_on=going_on,
                )  # fmt: skip
        if isinstance(last, host_membership.PauseHosts):
            self._pause(last)
        elif isinstance(last, host_membership.ResumeHosts):
            self._resume(last)

    def _abandon(self, command: host_membership.AbandonHost) -> None:
        group, name = self._group, command.name
        group.observer.event("host_lost", host=name, why=command.why)
        group.failure_log.host_died(name, command.why, self._inbox.silent_for(name))
        check_whole(group.plan.holdings, name, command.why)
        if command.drop:
            self._transport.drop(name, command.why)

    def _pause(self, command: host_membership.PauseHosts) -> None:
        self._paused_at = self._paused_at or time.monotonic()
        for name in self._others():
            self._link.tell(name, PauseWorkers(generation=command.generation))
        self._regroup.pause(command.generation)

    def _resume(self, command: host_membership.ResumeHosts) -> None:
        order = RegroupOrder(
            step=command.step,
            workers=dict(command.workers),
            addresses={name: self._statuses[name].address for name in command.workers},
            actions=dict(command.actions),
            source=command.source,
        )
        for name in self._others():
            lease = max(self._leased, 0)
            told = tuple(self._group.told)
            self._link.tell(name, ResumeWorkers(order=order, lease=lease, told=told))
        self._regroup.resume(order)
