"""The hosts of a job, as the master sees them: `fleet` decides, here is the I/O of it.

The master listens; agents come, are checked, set up, and then held and arranged like the master's
own crew. All calls come from the master's thread.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lockstep import fleet, numerics
from lockstep.cargo import Store
from lockstep.crew import Orders
from lockstep.errors import (
    IntegrityError,
    LockstepError,
    PeerTimeoutError,
    ProtocolError,
    RefusedError,
    TaskError,
    from_message,
    to_message,
)
from lockstep.fleet import Fleet, Standing, in_order
from lockstep.holdings import Holdings, Samples, check_open, check_whole, held_out_batches
from lockstep.host import Host
from lockstep.link import Link
from lockstep.net.frames import Message
from lockstep.net.handshake import check_facts
from lockstep.net.tcp import TcpTransport
from lockstep.net.transport import Heard, Report, ignore
from lockstep.offer import Launcher, Offer
from lockstep.planning import Plan, share, share_batches
from lockstep.station import Station

if TYPE_CHECKING:
    from lockstep.coordinator import Coordinator

MOST_SAMPLES = 1 << 48
GATHER_SECONDS = 600.0
"""How long hosts that are known of may take to load the task and its data."""


class Hosts:
    """Use it as a context manager: agents end when it is closed."""

    def __init__(
        self,
        launcher: Launcher,
        job: str,
        facts: Mapping[str, str],
        samples: Samples,
        silent_seconds: float,
    ) -> None:
        """Listen for the agents of a job. `facts` are what they must have in common; `samples` is
        what the master's host has."""
        self._launcher, self._silent_seconds = launcher, silent_seconds
        self.reports: deque[tuple[str, str]] = deque()
        """Connections that were closed or refused: who, and why."""
        report: Report = lambda who, why: self.reports.append((who, why))  # noqa: E731
        name = launcher.identity.node
        self._job, self._facts = job, facts
        self._transport = TcpTransport(
            launcher.identity,
            job=job,
            facts={},
            host=launcher.host,
            report=report,
            answer=True,
            silence=silent_seconds,
        )
        self.cargo = Store(self._transport)
        """What other hosts may fetch."""
        self.link = Link(self._transport, self.cargo.serve)
        self.station = Station(
            launcher.identity, launcher.host, job, report, self.link.wake, silent_seconds
        )
        self.capacities = {name: launcher.workers or numerics.cores()}
        """By host, how many workers it would run. The master's own is the first."""
        self._samples = {name: samples}
        self._plan: Plan | None = None
        self.own_plan: Plan
        """The part of the master's own host."""
        self._ready: dict[str, int] = {}
        self._crew: Coordinator | None = None
        self._leased = -1
        self._fleet = Fleet(master=name)
        self._standings: dict[str, Standing] = {}
        self._asked: dict[str, set[int]] = {}
        """Held-out batches that other hosts have not answered yet."""
        self._told: dict[tuple[str, int], str] = {}
        """By host and step, a digest of what it has recorded, until it has been compared."""
        self._kept: list[Heard] = []
        """What was heard while answers were waited for."""
        self._troubled_at = -1
        """The step at which hosts last had trouble with each other."""
        self._held_at = 0.0
        """Since when hosts have been held without a step in between; 0: they go on."""
        self._expected: tuple[str, ...] = ()
        """The hosts that were there when the job was offered."""
        launcher.report = report

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of everybody, however the run has ended."""
        self.end()
        self._launcher.close()
        self._launcher.report = ignore  # the launcher may stay, and would keep all of this
        self.station.close()
        self._transport.close()
        self.link.close()
        self.cargo.close()

    # Before the run: gather those who are there, and tell them the plan.

    def gather(self, **offer: Any) -> None:
        """Offer the job, and wait until the hosts that there are have loaded the task.

        `offer` has what an `Offer` says of the task.

        Raises:
            LockstepError: one of them cannot take part; says why.
        """
        master, address = self._fleet.master, self._transport.address
        self._expected = self._launcher.offer(
            Offer(job=self._job, master=master, address=address, **offer)
        )
        self._await(self.capacities, "to load the task and its data")

    def set_up(self, plan: Plan, host: Host) -> dict[str, Any]:
        """Have every host, `host` is the master's own, allocate what the plan needs, and the others
        start their workers; returns the numerics profile."""
        self._plan = plan
        workers = share(plan.workers, self.capacities)
        for name in self._others():
            self._set_up(name, workers[name])
        self.own_plan = plan.for_host(self._fleet.master, workers[self._fleet.master])
        profile = host.set_up(self.own_plan, networked=True)
        self._await(self._ready, "to set up its memory")
        return profile

    def _await(self, known: Mapping[str, int], what: str) -> None:
        limit = time.monotonic() + GATHER_SECONDS
        while missing := sorted(set(self._expected) - known.keys()):
            if time.monotonic() > limit:
                raise PeerTimeoutError(
                    f"host {', '.join(missing)} did not answer in time",
                    expected=f"{what} within {GATHER_SECONDS:.0f} s",
                    fix="look at what its agent says, or let it leave the cluster",
                )
            for who, why in self._reported():
                if who in missing:
                    raise RefusedError(f"host {who} cannot take part", found=why)
            for heard in self._hear(0.2):
                if heard.error is not None:
                    raise heard.error
                self._heard_early(heard.peer, heard.message or {})

    def _reported(self) -> list[tuple[str, str]]:
        return [self.reports.popleft() for _ in range(len(self.reports))]

    def _hear(self, seconds: float) -> list[Heard]:
        select.select([self.link], [], [], seconds)
        return self.link.take()

    def _heard_early(self, name: str, message: Message) -> None:
        if message["op"] == "failed":
            raise _about(name, message)
        self._note(name, message)

    def _note(self, name: str, message: Message) -> None:
        """A host has come, or is set up."""
        match message["op"]:
            case "present":
                self._present(name, message)
            case "ready":
                self._ready[name] = _count(message["workers"])
                if self._crew is not None:
                    self._decide([fleet.Present(name, self._ready[name])])

    def _present(self, name: str, message: Message) -> None:
        """A host has loaded the task.

        Raises:
            RefusedError: it differs from the others, and the run has not begun.
        """
        try:
            check_facts(self._facts, message["facts"], name)
            if self._plan is not None:
                check_open(self._plan.holdings, name)
        except RefusedError as error:
            self.link.tell(name, "refused", error=to_message(error))
            if self._plan is None:
                raise
            if self._crew is not None:
                self._crew.sink.event("refused", host=name, why=error.found)
            return
        train, held_out = message["samples"]
        self._samples[name] = _count(train, most=MOST_SAMPLES), _count(held_out, 0, MOST_SAMPLES)
        self.capacities[name] = _count(message["workers"])
        if self._crew is not None:
            self._set_up(name, self.capacities[name])

    def _set_up(self, name: str, workers: int) -> None:
        assert self._plan is not None
        plan = self._plan.for_host(name, workers)
        self.link.tell(name, "set_up", plan=plan.to_message())

    @property
    def samples(self) -> dict[str, Samples]:
        """By host, how many samples it has; in the order in which hosts share out shards."""
        return {name: self._samples[name] for name in in_order(self._samples, self._fleet.master)}

    # During the run.

    @property
    def capacity(self) -> int:
        """How many workers all hosts together would run."""
        return sum(self.capacities.values())

    def begin(self, crew: Coordinator) -> None:
        """The master's own crew is there: arrange all."""
        self._crew = crew
        crew.host.also_wake = self.link.fileno()
        present = {self._fleet.master: crew.plan.workers, **self._ready}
        self._decide([fleet.Present(name, workers) for name, workers in present.items()])

    def look(self) -> None:
        """See what hosts have said, who is lost, and who rests."""
        assert self._crew is not None
        events: list[fleet.Event] = []
        for who, why in self._reported():
            self._crew.sink.event("connection", peer=who, why=why)
        kept, self._kept = self._kept, []
        for heard in [*kept, *self.link.take()]:
            events += self._heard(heard)
        events += self._silences(self._fleet.members)
        while self.station.troubles:
            trouble = self.station.troubles.popleft()
            events.append(
                fleet.Trouble(self._fleet.master, trouble.generation, trouble.peer, trouble.why)
            )
        self._compare()
        standing = self._crew.stands()
        if standing is not None:
            generation = self._fleet.generation
            events.append(fleet.Stood(self._fleet.master, generation, standing))
        committed = self._crew.history.committed_at
        if self._held_at and committed > self._held_at and not self._fleet.regrouping:
            stalled = round((committed - self._held_at) * 1e3, 2)
            self._crew.sink.event(
                "regrouped", generation=self._fleet.generation, stalled_ms=stalled
            )
            self._held_at = 0.0
        if self._fleet.troubles and self._crew.step > self._troubled_at:
            events.append(fleet.Moved())
        self._decide(events)

    def _compare(self) -> None:
        """Compare what hosts have recorded of the same steps: losses, and parts of the state.

        Raises:
            IntegrityError: it is not the same.
        """
        assert self._crew is not None
        marks = self._crew.history.marks
        for (name, step), digest in list(self._told.items()):
            if step >= self._crew.step:
                continue  # not recorded here yet
            del self._told[name, step]
            if marks.get(step, digest) != digest:
                raise IntegrityError(
                    f"host {name} and host {self._fleet.master} have computed different states",
                    expected=f"the same record of step {step}: {marks[step]}",
                    found=digest,
                    fix="look for faulty memory on both; then resume from the last checkpoint",
                )

    def torn(self, why: str) -> None:
        """The state of the master's own host is torn: all have to be regrouped."""
        self._decide([fleet.Trouble(self._fleet.master, self._fleet.generation, "", why)])

    def lease(self, step: int) -> None:
        """Let all hosts run every step before this one."""
        if step != self._leased:
            self._leased = step
            for name in self._others():
                self.link.tell(name, "lease", step=step)

    # Held-out batches, while all rest.

    def share_out(self, number: int, batches: Sequence[int]) -> list[int]:
        """Give the other hosts their part of a round of held-out batches, by their numbers of
        workers; returns that of the master's own."""
        assert self._crew is not None and self._plan is not None
        if self._holdings:
            owned = held_out_batches(self._holdings, self._plan.eval_batch_size)
            shares = {name: [n for n in batches if n in owned[name]] for name in owned}
        else:
            workers = {name: member.workers for name, member in self._fleet.members.items()}
            shares = share_batches(batches, workers, self._fleet.master)
        rest = shares.pop(self._fleet.master)
        self._asked = {name: set(mine) for name, mine in shares.items()}
        for name, mine in shares.items():
            message = {"round": number, "step": self._crew.step, "batches": mine}
            self.link.tell(name, "evaluate", **message)
        return rest

    def gather_batches(self) -> None:
        """Wait for the answers. Who is lost, or torn, is not waited for."""
        assert self._crew is not None
        while waiting := [name for name, batches in self._asked.items() if batches]:
            self._kept += [heard for heard in self._hear(0.2) if not self._is_answer(heard)]
            for name in waiting:
                if self._holdings:  # nobody else can do them: it is waited for while it is there
                    self._decide(self._ending(name))
                elif any(heard.peer == name for heard in self._kept) or self._is_silent(name):
                    self._asked[name] = set()

    def _ending(self, name: str) -> list[fleet.Event]:
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

    def _silences(self, names: Iterable[str]) -> list[fleet.Event]:
        """The losses of those that have given no sign of life for too long."""
        return [
            fleet.Lost(name, f"no sign of life for {self.link.silent_for(name):.1f} s")
            for name in names
            if name != self._fleet.master and self._is_silent(name)
        ]

    @property
    def _holdings(self) -> Holdings:
        return () if self._plan is None else self._plan.holdings

    def _is_answer(self, heard: Heard) -> bool:
        """Take an answer to a held-out batch."""
        assert self._crew is not None
        message = heard.message or {}
        if message.get("op") != "batch":
            return bool(message.get("op") in ("event", "recovered")) and not self._said(
                heard.peer, message
            )
        self._asked.get(heard.peer, set()).discard(message["batch"])
        if message["result"] is not None:
            self._crew.evaluation.heard({**message, "event": "batch"})
        elif self._holdings:
            raise TaskError(
                f"host {heard.peer} cannot send what Task.outputs returned: it is too long",
                expected="at most 1 MiB for a held-out batch",
                fix="lower eval_batch_size, or return less",
            )
        return True

    def end(self) -> None:
        """The run is over: let the agents go. Without it they would take the master for lost."""
        for name in self._transport.peers:
            self.link.tell(name, "end")

    def _others(self) -> list[str]:
        """All hosts of the run but the master's own."""
        known = self.capacities if self._crew is None else self._fleet.members
        return [name for name in known if name != self._fleet.master]

    def _heard(self, heard: Heard) -> list[fleet.Event]:
        name, message = heard.peer, heard.message
        if message is None:
            self.capacities.pop(name, None)
            self._samples.pop(name, None)
            self._ready.pop(name, None)
            why = heard.error.found or heard.error.what if heard.error else "it has gone"
            return [fleet.Lost(name, why)] if name in self._fleet.members else []
        try:
            return self._said(name, message)
        except (KeyError, TypeError, ValueError) as error:
            problem = ProtocolError(
                f"host {name} has sent a message that says nothing", found=ascii(error)[:200]
            )
            self._transport.drop(name, problem.what)
            return [fleet.Lost(name, problem.what)]

    def _said(self, name: str, message: Message) -> list[fleet.Event]:
        assert self._crew is not None
        sink = self._crew.sink
        match message["op"]:
            case "stood":
                standing = Standing.from_message(message["standing"])
                return [fleet.Stood(name, message["generation"], standing)]
            case "trouble":
                peer, why = str(message["other"]), str(message["why"])
                return [fleet.Trouble(name, message["generation"], peer, why)]
            case "recorded":
                self._told[name, int(message["step"])] = str(message["digest"])
            case "event":
                sink.event(str(message["name"]), **{**message["fields"], "host": name})
            case "recovered":
                sink.recovered([{**each, "host": name} for each in message["recoveries"]])
            case "failed" if name not in self._fleet.members:  # it was to join; all go on
                sink.event("refused", host=name, why=str(_about(name, message)))
            case "failed":
                error = _about(name, message)
                raise self._crew.failures.raised(error, message["step"], self._crew.snapshot)
            case _:
                self._note(name, message)
        return []

    def _decide(self, events: list[fleet.Event]) -> None:
        """Let the fleet decide on what has happened, and carry its last word out."""
        assert self._crew is not None
        last: fleet.Hold | fleet.Arrange | None = None
        for event in events:
            if isinstance(event, fleet.Stood):
                self._standings[event.name] = event.standing
            self._fleet, commands, reason = fleet.decide(self._fleet, event)
            if isinstance(event, fleet.Trouble):
                self._troubled_at = self._crew.step
            for command in commands:
                if isinstance(command, fleet.Abandon):
                    self._crew.sink.event("host_lost", host=command.name, why=command.why)
                    silent = self.link.silent_for(command.name)
                    self._crew.failures.host_died(command.name, command.why, silent)
                    check_whole(self._holdings, command.name, command.why)
                    self._transport.drop(command.name, command.why)
                else:
                    last = command
                    self._crew.sink.event(
                        "hosts", generation=self._fleet.generation, reason=reason,
                        hosts=sorted(self._fleet.members), going_on=isinstance(last, fleet.Arrange),
                    )  # fmt: skip
        if isinstance(last, fleet.Hold):
            self._held_at = self._held_at or time.monotonic()
            for name in self._others():
                self.link.tell(name, "hold", generation=last.generation)
            self._crew.hold(last.generation)
        elif isinstance(last, fleet.Arrange):
            self._arrange(last)

    def _arrange(self, command: fleet.Arrange) -> None:
        assert self._crew is not None
        addresses = {name: self._standings[name].address for name in command.workers}
        orders = Orders(
            step=command.step,
            workers=command.workers,
            addresses=addresses,
            actions=command.actions,
            source=command.source,
        )
        for name in self._others():
            lease = max(self._leased, 0)
            self.link.tell(name, "arrange", **orders.to_message(), lease=lease)
        self._crew.arrange(orders)


def _count(value: object, least: int = 1, most: int = 1 << 16) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"not a number from {least} to {most}: {value!r}")
    return value


def _about(name: str, message: Message) -> LockstepError:
    """A host's error, with its name."""
    error = from_message(message["error"])
    what = error.what if f"host {name}" in error.what else f"host {name}: {error.what}"
    return type(error)(what, expected=error.expected, found=error.found, fix=error.fix)
