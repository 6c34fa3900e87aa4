"""The hosts of a job, as the master sees them: `host_membership` decides, here is the I/O of it.

The master listens; agents come, are checked and set up (`rendezvous`), and then held and arranged
like the master's own crew. All calls come from the master's thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lockstep.agent.answer_chunks import AnswerAssembler
from lockstep.agent.evaluation_rounds import Inferred
from lockstep.agent.job_offer import JobOffer
from lockstep.agent.local_host import LocalHost
from lockstep.agent.regroup_messages import HostStatus, RegroupOrder
from lockstep.collectives.host_mesh import HostMesh
from lockstep.coordinator import host_membership as host_membership
from lockstep.coordinator.divergence_check import DivergenceCheck
from lockstep.coordinator.host_membership import HostMembership
from lockstep.coordinator.launcher import Launcher
from lockstep.coordinator.rendezvous import Rendezvous, about
from lockstep.errors import ProtocolError, RefusedError
from lockstep.net.blob_transfer import BlobServer
from lockstep.net.control_link import ControlLink
from lockstep.net.frames import Message
from lockstep.net.tcp_transport import TcpTransport
from lockstep.net.transport import Heard, ignore
from lockstep.planning.data_partition import Holdings, Samples, check_whole, held_out_batches
from lockstep.planning.ownership import Ownership
from lockstep.planning.plan import Plan
from lockstep.planning.shard_placement import share_batches

if TYPE_CHECKING:
    from lockstep.coordinator.coordinator import Coordinator


class HostGroup:
    """Use it as a context manager: agents end when it is closed."""

    def __init__(
        self,
        launcher: Launcher,
        job: str,
        facts: Mapping[str, str],
        samples: Samples,
        silent_seconds: float,
        ownership: Ownership,
    ) -> None:
        """Listen for the agents of a job. `facts` are what they must have in common; `samples` is
        what the master's host has."""
        self._launcher, self._silent_seconds = launcher, silent_seconds
        self._job, self._master = job, launcher.identity.node

        def report(who: str, why: str) -> None:
            self.rendezvous.reports.append((who, why))

        self._transport = TcpTransport(
            launcher.identity,
            job=job,
            facts={},
            host=launcher.host,
            report=report,
            answer=True,
            silence=silent_seconds,
        )
        self.blobs = BlobServer(self._transport)
        """What other hosts may fetch."""
        self.link = ControlLink(self._transport, self.blobs.serve)
        self.rendezvous = Rendezvous(self.link, launcher, facts, samples, ownership)
        launcher.report = report
        self.mesh = HostMesh(
            launcher.identity, launcher.host, job, report, self.link.wake, silent_seconds
        )
        self.own_plan: Plan
        """The part of the master's own host."""
        self.waiting: dict[str, int] = {}
        """Hosts that wait to be let in, with their workers: where none has the whole state, they
        come in when the base is up to date."""
        self._worker_group: Coordinator | None = None
        self._leased = -1
        self._membership = HostMembership(master=self._master, whole=ownership.whole)
        self._standings: dict[str, HostStatus] = {}
        self._answers = AnswerAssembler()
        self._asked: dict[str, set[int]] = {}
        """Held-out batches that other hosts have not answered yet."""
        self._agreement = DivergenceCheck()
        self._kept: list[Heard] = []
        """What was heard while answers were waited for."""
        self._troubled_at = -1
        """The step at which hosts last had trouble with each other."""
        self._held_at = 0.0
        """Since when hosts have been held without a step in between; 0: they go on."""

    def __enter__(self) -> HostGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of everybody, however the run has ended."""
        self.end()
        self._launcher.close()
        self._launcher.report = ignore  # the launcher may stay, and would keep all of this
        self.mesh.close()
        self._transport.close()
        self.link.close()
        self.blobs.close()

    # Before the run: gather those who are there, and tell them the plan.

    def gather(self, **offer: Any) -> None:
        """Offer the job, and wait until the hosts that there are have loaded the task.

        `offer` has what an `JobOffer` says of the task.

        Raises:
            LockstepError: one of them cannot take part; says why.
        """
        address = self._transport.address
        self.rendezvous.gather(
            JobOffer(job=self._job, master=self._master, address=address, **offer)
        )

    def set_up(self, plan: Plan, host: LocalHost) -> dict[str, Any]:
        """Have every host, `host` is the master's own, allocate what the plan needs, and the others
        start their workers; returns the numerics profile."""
        self.own_plan, profile = self.rendezvous.set_up(plan, host)
        return profile

    @property
    def capacity(self) -> int:
        """How many workers would compute on all hosts together."""
        return self.rendezvous.capacity

    # During the run.

    def begin(self, worker_group: Coordinator) -> None:
        """The master's own crew is there: arrange all."""
        self._worker_group = worker_group
        worker_group.host.also_wake = self.link.fileno()
        present = {self._master: worker_group.plan.workers, **self.rendezvous.ready}
        self._decide(
            [host_membership.HostReady(name, workers) for name, workers in present.items()]
        )

    def look(self) -> None:
        """See what hosts have said, who is lost, and who rests."""
        assert self._worker_group is not None
        events: list[host_membership.Event] = []
        for who, why in self.rendezvous.reported():
            self._worker_group.observer.event("connection", peer=who, why=why)
        kept, self._kept = self._kept, []
        for heard in [*kept, *self.link.take()]:
            events += self._heard(heard)
        events += self._silences(self._membership.members)
        while self.mesh.troubles:
            trouble = self.mesh.troubles.popleft()
            events.append(
                host_membership.ExchangeFailed(
                    self._master, trouble.generation, trouble.peer, trouble.why
                )
            )
        self._agreement.check(self._worker_group.history)
        standing = self._worker_group.stands()
        if standing is not None:
            generation = self._membership.generation
            events.append(host_membership.HostPaused(self._master, generation, standing))
        committed = self._worker_group.history.committed_at
        if self._held_at and committed > self._held_at and not self._membership.regrouping:
            stalled = round((committed - self._held_at) * 1e3, 2)
            self._worker_group.observer.event(
                "regrouped", generation=self._membership.generation, stalled_ms=stalled
            )
            self._held_at = 0.0
        if self._membership.troubles and self._worker_group.step > self._troubled_at:
            events.append(host_membership.StepsCommitted())
        self._decide(events)

    def torn(self, why: str) -> None:
        """The state of the master's own host is torn: all have to be regrouped."""
        self._decide(
            [host_membership.ExchangeFailed(self._master, self._membership.generation, "", why)]
        )

    def lease(self, step: int) -> None:
        """Let all hosts run every step before this one."""
        if step != self._leased:
            self._leased = step
            for name in self._others():
                self.link.tell(name, "lease", step=step)

    # Held-out batches, while all rest.

    def share_out(self, what: Inferred, number: int, batches: Sequence[int]) -> list[int]:
        """Give the other hosts their part of a round of held-out batches, by their numbers of
        workers; returns that of the master's own."""
        assert self._worker_group is not None
        if self._holdings:
            owned = held_out_batches(self._holdings, self.own_plan.eval_batch_size)
            shares = {name: [n for n in batches if n in owned[name]] for name in owned}
        else:
            workers = {name: member.workers for name, member in self._membership.members.items()}
            shares = share_batches(batches, workers, self._master)
        rest = shares.pop(self._master)
        self._answers.begin(number)
        self._asked = {name: set(mine) for name, mine in shares.items()}
        for name, mine in shares.items():
            message = {"round": number, "step": self._worker_group.step, "batches": mine}
            self.link.tell(name, what, **message)
        return rest

    def gather_batches(self) -> None:
        """Wait for the answers. Who is lost, or torn, is not waited for."""
        assert self._worker_group is not None
        while waiting := [name for name, batches in self._asked.items() if batches]:
            self._keep(0.2)
            for name in waiting:
                if self._holdings:  # nobody else can do them: it is waited for while it is there
                    self._decide(self._ending(name))
                elif any(heard.peer == name for heard in self._kept) or self._is_silent(name):
                    self._asked[name] = set()

    def _ending(self, name: str) -> list[host_membership.Event]:
        """What has ended a host's part in the run, if anything has; raises the error if it has
        failed."""
        ends = [
            heard
            for heard in self._kept
            if heard.peer == name and (heard.message is None or heard.message["op"] == "failed")
        ]
        events = [event for heard in ends for event in self._heard(heard)]
        return events + self._silences([name])

    def _is_silent(self, name: str) -> bool:
        return self.link.silent_for(name) > self._silent_seconds

    def _silences(self, names: Iterable[str]) -> list[host_membership.Event]:
        """The losses of those that have given no sign of life for too long."""
        return [
            host_membership.HostLost(
                name, f"no sign of life for {self.link.silent_for(name):.1f} s"
            )
            for name in names
            if name != self._master and self._is_silent(name)
        ]

    @property
    def _holdings(self) -> Holdings:
        return self.own_plan.holdings

    def _keep(self, seconds: float) -> None:
        """Hear for so many seconds, and keep for later what cannot be dealt with now."""
        self._kept += [
            heard for heard in self.rendezvous.hear(seconds) if not self._is_answer(heard)
        ]

    def _is_answer(self, heard: Heard) -> bool:
        """Take an answer to a held-out batch."""
        assert self._worker_group is not None
        message = heard.message or {}
        if message.get("op") != "batch":
            return bool(message.get("op") in ("event", "recovered")) and not self._said(
                heard.peer, message
            )
        try:
            answer = self._answers.add(heard.peer, message)
        except (KeyError, TypeError, ValueError) as error:
            self._transport.drop(heard.peer, f"it has sent no answer: {ascii(error)[:200]}")
            return True
        if answer is not None:
            self._asked.get(heard.peer, set()).discard(answer["batch"])
            self._worker_group.evaluation.batch_done(**answer)
        return True

    # The parts of the state that each host alone has, while all rest.

    def gather_parts(self) -> bool:
        """Get the other hosts' parts of the state. False: one is lost, or has a trouble."""
        assert self._worker_group is not None
        for name in self._others():
            self.link.tell(name, "give", step=self._worker_group.step)
        return self._worker_group.take_parts(self._undisturbed)

    def _undisturbed(self) -> bool:
        """Whether nobody has said, since all rest, that it cannot go on."""
        self._keep(0.0)
        silent = any(map(self._is_silent, self._others()))
        quiet = ("present", "ready", "recorded", "stood")
        return not silent and all(
            heard.message is not None and heard.message.get("op") in quiet for heard in self._kept
        )

    def let_in(self) -> None:
        """Let the hosts that wait take part from here on."""
        waiting, self.waiting = self.waiting, {}
        self._decide(
            [host_membership.HostReady(name, workers) for name, workers in waiting.items()]
        )

    def end(self) -> None:
        """The run is over: let the agents go. Without it they would take the master for lost."""
        for name in self._transport.peers:
            self.link.tell(name, "end")

    def _others(self) -> list[str]:
        """All hosts of the run but the master's own."""
        return [name for name in self._membership.members if name != self._master]

    def _heard(self, heard: Heard) -> list[host_membership.Event]:
        name, message = heard.peer, heard.message
        if message is None:
            self.rendezvous.lost(name)
            self.waiting.pop(name, None)
            why = heard.error.found or heard.error.what if heard.error else "it has gone"
            return (
                [host_membership.HostLost(name, why, closed=True)]
                if name in self._membership.members
                else []
            )
        try:
            return self._said(name, message)
        except (KeyError, TypeError, ValueError) as error:
            problem = ProtocolError(
                f"host {name} has sent a message that says nothing", found=ascii(error)[:200]
            )
            self._transport.drop(name, problem.what)
            return [host_membership.HostLost(name, problem.what)]

    def _said(self, name: str, message: Message) -> list[host_membership.Event]:
        assert self._worker_group is not None
        observer = self._worker_group.observer
        match message["op"]:
            case "stood":
                standing = HostStatus.from_message(message["standing"])
                return [host_membership.HostPaused(name, message["generation"], standing)]
            case "trouble":
                peer, why = str(message["other"]), str(message["why"])
                return [host_membership.ExchangeFailed(name, message["generation"], peer, why)]
            case "recorded":
                self._agreement.told(name, int(message["step"]), str(message["digest"]))
            case "event":
                observer.event(str(message["name"]), **{**message["fields"], "host": name})
            case "recovered":
                observer.recovered([{**each, "host": name} for each in message["recoveries"]])
            case "failed" if name not in self._membership.members:  # it was to join; all go on
                observer.event("refused", host=name, why=str(about(name, message)))
            case "failed":
                error = about(name, message)
                raise self._worker_group.failures.raised(
                    error, message["step"], self._worker_group.snapshot
                )
            case "present":
                try:
                    self.rendezvous.present(name, message, running=True)
                except RefusedError as refused:
                    observer.event("refused", host=name, why=refused.found)
            case "ready":
                workers = self.rendezvous.is_ready(name, message)
                if self._membership.whole:
                    return [host_membership.HostReady(name, workers)]
                self.waiting[name] = workers
        return []

    def _decide(self, events: list[host_membership.Event]) -> None:
        """Let the fleet decide on what has happened, and carry its last word out."""
        assert self._worker_group is not None
        last: host_membership.PauseHosts | host_membership.ResumeHosts | None = None
        for event in events:
            if isinstance(event, host_membership.HostPaused):
                self._standings[event.name] = event.standing
            self._membership, commands, reason = host_membership.decide(self._membership, event)
            if isinstance(event, host_membership.ExchangeFailed):
                self._troubled_at = self._worker_group.step
            for command in commands:
                if isinstance(command, host_membership.AbandonHost):
                    self._worker_group.observer.event(
                        "host_lost", host=command.name, why=command.why
                    )
                    silent = self.link.silent_for(command.name)
                    self._worker_group.failures.host_died(command.name, command.why, silent)
                    check_whole(self._holdings, command.name, command.why)
                    if command.drop:
                        self._transport.drop(command.name, command.why)
                else:
                    last = command
                    self._worker_group.observer.event(
                        "hosts", generation=self._membership.generation, reason=reason,
                        hosts=sorted(self._membership.members), going_on=isinstance(last,
                        host_membership.ResumeHosts),
                    )  # fmt: skip
        if isinstance(last, host_membership.PauseHosts):
            self._held_at = self._held_at or time.monotonic()
            for name in self._others():
                self.link.tell(name, "hold", generation=last.generation)
            self._worker_group.hold(last.generation)
        elif isinstance(last, host_membership.ResumeHosts):
            self._arrange(last)

    def _arrange(self, command: host_membership.ResumeHosts) -> None:
        assert self._worker_group is not None
        addresses = {name: self._standings[name].address for name in command.workers}
        orders = RegroupOrder(
            step=command.step,
            workers=command.workers,
            addresses=addresses,
            actions=command.actions,
            source=command.source,
        )
        for name in self._others():
            lease = max(self._leased, 0)
            self.link.tell(name, "arrange", **orders.to_message(), lease=lease)
        self._worker_group.arrange(orders)
