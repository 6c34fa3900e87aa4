"""The coordinator: the master's loop. It grants leases, drains the ring, and acts when all rest.

Workers run by themselves up to the lease. At a *stop* (the end of a data epoch, a checkpoint, the
end) the lease is not extended, all workers come to rest with the state committed, and the
coordinator evaluates, copies the state or ends the run. Who the workers are is decided by
`membership`, and where they go on after a change by `recovery`; here is the I/O of both.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lockstep import membership
from lockstep.base import steps_between
from lockstep.channel import Closed, Message
from lockstep.clock import Clock
from lockstep.control import RING, Phase, progress_of
from lockstep.desk import Request
from lockstep.errors import NumericsError, StoppedError, WorkerLostError
from lockstep.evaluation import Evaluation
from lockstep.failures import Failures
from lockstep.history import History
from lockstep.host import Event, Host
from lockstep.membership import Members
from lockstep.planning import Plan
from lockstep.recovery import resume
from lockstep.sink import Sink

TICK = 0.05
"""Seconds between two looks at the ring."""
AHEAD_STEPS = (4, RING - 16)
"""The least and the most steps that the lease runs ahead of what has been recorded."""
DISMISS_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """At which steps the run comes to rest, and for what."""

    steps: int
    steps_per_epoch: int
    evaluate: bool = False
    checkpoint_steps: int | None = None
    checkpoint_seconds: float | None = None
    seconds: float | None = None
    """Stop for good when so many seconds of steps have been timed."""
    ahead_seconds: float = 0.5
    """How far the lease runs ahead of what has been recorded."""

    def evaluates_at(self, step: int) -> bool:
        """Whether held-out data are evaluated after `step` committed steps."""
        ends = step == self.steps or (step > 0 and step % self.steps_per_epoch == 0)
        return self.evaluate and ends

    def checkpoints_at(self, step: int) -> bool:
        """Whether a checkpoint is written after `step` committed steps."""
        every = self.checkpoint_steps
        return step == self.steps or (every is not None and step > 0 and step % every == 0)

    def next_stop(self, step: int) -> int:
        """The first stop after `step`."""
        stops = [self.steps]
        if self.evaluate:
            stops.append((step // self.steps_per_epoch + 1) * self.steps_per_epoch)
        if self.checkpoint_steps is not None:
            stops.append((step // self.checkpoint_steps + 1) * self.checkpoint_steps)
        return min(stops)


class Coordinator:
    """Runs a plan on a host whose state is set up, from `step` to the plan's end."""

    def __init__(
        self,
        host: Host,
        plan: Plan,
        schedule: Schedule,
        sink: Sink,
        step: int = 0,
        *,
        warm_up: float = 0.0,
        requests: Callable[[], list[Request]] = list,
    ) -> None:
        self.host, self.plan, self.schedule, self.sink = host, plan, schedule, sink
        self.control = host.control
        self.clock = Clock(warm_up)
        self.history = History(host, plan, sink, self.clock, step)
        self.failures = Failures(host, self.history, sink)
        self.members = Members(target=plan.workers, seats=plan.seats)
        self._requests = requests
        self._stop = schedule.next_stop(step)
        self._checkpointed = time.monotonic()
        self._idle: dict[int, int] = {}
        self.evaluation = Evaluation(self)
        self._marked = step
        """The last step at whose end the base is, or will be, brought up to date."""
        self._checkpoint_asked = self._stop_asked = self._paused = False
        first = progress_of(step, Phase.STARTED)
        for seat in range(plan.seats):
            self.control.set_progress(seat, first)
            self.control.set_updating(seat, -1)
        host.base.take(step)

    @property
    def step(self) -> int:
        """How many steps are committed and recorded."""
        return self.history.step

    def run(self) -> None:
        """Run to the plan's last step.

        Raises:
            StoppedError: somebody asked to stop; a checkpoint of the last step was given to the
                sink.
            LockstepError: the run cannot go on; what was committed has been given to the sink.
        """
        self.decide(membership.Begin())
        while True:
            self._run_to_stop()
            self._at_rest()
            if self._stop_asked:
                self._dismiss()
                raise StoppedError(f"stopped after step {self.step}, as asked")
            if self.step >= self.plan.steps or self._time_is_up():
                break
            self._stop = self.schedule.next_stop(self.step)
            self._grant()
        self._dismiss()

    def run_at_rest(self, work: Callable[[], None]) -> None:
        """Gather the workers, do something while they rest, and send them home.

        Raises:
            LockstepError: it cannot be done.
        """
        self.decide(membership.Begin())
        self._run_to_stop()
        work()
        self._dismiss()

    # Membership: what happened goes to the pure machine, what it commands is carried out.

    def decide(self, event: membership.Event) -> None:
        """Let the machine decide on an event and carry its commands out."""
        self.members, commands, reason = membership.decide(self.members, event)
        for command in commands:
            match command:
                case membership.Spawn(seat):
                    pid = self.host.spawn(seat).pid
                    self.sink.event("spawned", worker=seat, pid=pid, reason=reason)
                case membership.Regroup():
                    self.control.raise_epoch()
                    self.sink.event("regroup", epoch=self.control.epoch, reason=reason)
                case membership.Dismiss(seat):
                    self.tell(seat, {"op": "stop"})
                    self.sink.event("dismissed", worker=seat, reason=reason)
                case membership.Form(seats):
                    self._form(seats, reason)
                case membership.GiveUp():
                    raise WorkerLostError(
                        f"workers cannot be started: {reason}",
                        fix="look for the out-of-memory killer, or for native code that crashes",
                    )

    def _form(self, seats: tuple[int, ...], reason: str) -> None:
        """Put the state in order and send the new members on. Everybody rests."""
        control = self.control
        members = self.history.seats or seats
        resumption = resume(
            [control.progress(seat) for seat in members],
            [control.updating(seat) for seat in members],
            control.shard_done.tolist(),
            control.base_step,
            len(seats),
        )
        if resumption.back is None:
            self.history.mend(resumption.step)
        else:
            self._go_back()
        for seat in {*members, *seats}:
            control.set_updating(seat, -1)
        for seat in seats:
            control.set_progress(seat, progress_of(resumption.step, Phase.STARTED))
            control.forget_shard(seat)
        self.history.seats = seats
        self._idle.clear()
        self.clock.rest()
        self._grant()
        self.failures.regrouped(resumption)
        self.sink.event("formed", seats=seats, step=resumption.step, reason=reason)
        for rank, seat in enumerate(seats):
            self.tell(
                seat,
                {
                    "op": "join",
                    "epoch": control.epoch,
                    "seats": seats,
                    "step": resumption.step,
                    "todo": resumption.todo[rank],
                    "refresh": resumption.back is None and not self.sink.busy(),
                    "loaders": self.failures.loaders_live,
                },
            )

    def _go_back(self) -> None:
        """Put the base in the place of a state that is torn."""
        self.history.drain()
        self.host.base.put_back()
        self.control.base_due[:] = 0  # later steps' marks may lie in the places of those redone

    def tell(self, seat: int, message: Message) -> None:
        """Send a message; to one that has just died, in vain: its death will be heard of."""
        with contextlib.suppress(Closed):
            self.host.seats[seat].channel.send(message)

    # Compute and synchronise: workers do it by themselves; record, and extend the lease.

    def _run_to_stop(self) -> None:
        """Return when every worker rests at the stop and everything before it is recorded."""
        while True:
            self.listen()
            self._take_requests()
            self.history.drain()
            self.sink.recovered(self.failures.recovered(self.history.committed_at))
            if self._rest_wanted():
                self._stop = min(self._stop, max(self.control.lease, self.step))
            if self._at_stop():
                return
            self._grant()
            self.watch()

    def watch(self) -> None:
        """See that everybody who has something to do gets on with it."""
        self.failures.kill_stalled(set(self.members.having(membership.Status.WORKING)))
        self.failures.kill_absent(self.members.status)

    def _rest_wanted(self) -> bool:
        """Whether the workers shall come to rest before the next stop."""
        return self._checkpoint_due() or self._time_is_up() or self._stop_asked or self._paused

    def _at_stop(self) -> bool:
        return (
            not self.members.regrouping
            and self.members.all_rest
            and bool(self._idle)
            and self.step >= self._stop
        )

    def _grant(self) -> None:
        """Extend the lease as far as it may go, and wake the workers that rest below it.

        Not while everybody is to rest: a lone worker meets nobody at a barrier who could tell it.
        """
        if self.members.regrouping:
            return
        least, most = AHEAD_STEPS
        per_second = self.clock.rate / self.plan.batch_size
        ahead = min(most, least + int(per_second * self.schedule.ahead_seconds))
        lease = max(self.control.lease, min(self.step + ahead, self._stop))
        self._mark(self.control.lease, lease, per_second)
        self.control.lease = lease
        woken = [seat for seat, step in self._idle.items() if step < lease]
        for seat in woken:
            del self._idle[seat]
            self.tell(seat, {"op": "run"})
        if woken:
            self.decide(membership.Resumed())

    def _mark(self, first: int, last: int, steps_per_second: float) -> None:
        """Mark the steps of a new lease at whose end the base is brought up to date: none while a
        checkpoint is being written from it."""
        every = steps_between(self.host.base.nbytes, self.plan.workers, steps_per_second)
        for step in range(first, last):
            due = step - self._marked >= every and not self.sink.busy()
            self.control.base_due[step % RING] = due
            if due:
                self._marked = step

    def listen(self) -> None:
        """Hear what the workers say, and who has died, for up to a tick."""
        for event in self.host.events(TICK):
            self._heard(event)
        self.failures.looked = time.monotonic()

    def _heard(self, event: Event) -> None:
        seat, message = event.seat, event.message
        if message is None:
            self.failures.died(seat, self.members.status.get(seat.number), self.snapshot)
            self._idle.pop(seat.number, None)
            self.decide(membership.Died(seat.number))
            return
        match message["event"]:
            case "hello":
                self._admit(seat.number, str(message["probe"]))
                self.decide(membership.Hello(seat.number))
            case "idle":
                self._idle[seat.number] = message["step"]
                self.decide(membership.Rested(seat.number))
            case "regroup":
                self.decide(membership.Rested(seat.number))
            case "batch" | "scored":
                self.evaluation.heard(message)
            case "inferred":
                self.decide(membership.Rested(seat.number))
            case "corrupt":
                facts = {name: value for name, value in message.items() if name != "event"}
                self.sink.event("corrupt", host=self.host.name, **facts)
                if "tensor" in facts:
                    self.failures.spoilt(facts)
                    self.decide(membership.Spoilt(seat.number))
            case "lost_loader":
                self.failures.lost_loader(seat)
            case "failed":
                raise self.failures.raised(message, self.snapshot)

    def _admit(self, number: int, probe: str) -> None:
        expected = self.host.facts["probe"]
        if probe != expected and self.plan.threads == 1:
            raise NumericsError(
                f"worker {number} does not compute the same bits as the nursery",
                expected=f"probe {expected}",
                found=f"probe {probe}",
                fix="run with --numerics portable",
            )
        pid = self.host.seats[number].pid
        self.sink.event("joined", host=self.host.name, worker=number, pid=pid, probe=probe)

    # At rest: the state is committed and nobody writes to it.

    def _at_rest(self) -> None:
        self.clock.rest()
        if self.schedule.evaluates_at(self.step):
            self.sink.evaluated(self.step, self.evaluation.run())
        if self.schedule.checkpoints_at(self.step) or self._checkpoint_due() or self._stop_asked:
            self._checkpoint()
        if self._paused:
            self._pause()

    def _checkpoint(self) -> None:
        self.sink.checkpoint(self.step, self.snapshot())
        self._checkpointed = time.monotonic()
        self._checkpoint_asked = False

    def _pause(self) -> None:
        """Stay at rest until somebody asks to go on. Workers may come and go meanwhile."""
        self.sink.event("paused", step=self.step)
        while self._paused and not self._stop_asked:
            self.listen()
            self._take_requests()
            self.watch()
            if self._checkpoint_asked and not self.sink.busy():
                self._checkpoint()
        self.sink.event("went_on", step=self.step)

    def snapshot(self) -> memoryview:
        """The base, brought up to date. Called when every worker rests."""
        self.sink.settle()
        return self.host.base.take(self.step)

    def await_rest(self) -> None:
        """Wait until the members in force all rest at the stop."""
        while self.members.regrouping or not self.members.all_rest:
            self.listen()
            self.watch()

    def _checkpoint_due(self) -> bool:
        every = self.schedule.checkpoint_seconds
        due = every is not None and time.monotonic() - self._checkpointed >= every
        return (due or self._checkpoint_asked) and not self.sink.busy()

    def _time_is_up(self) -> bool:
        limit = self.schedule.seconds
        return limit is not None and self.clock.seconds >= limit

    # Requests.

    def check_stop(self) -> None:
        """Take what was asked for since; raise `StoppedError` if that was to stop."""
        self._take_requests()
        if self._stop_asked:
            self._dismiss()
            raise StoppedError("stopped, as asked")

    def _take_requests(self) -> None:
        for name, number in self._requests():
            self.sink.event("request", request=name, number=number)
            match name:
                case "scale":
                    self.decide(membership.Target(number))
                case "stop":
                    self._stop_asked = True
                case "checkpoint":
                    self._checkpoint_asked = True
                case "pause":
                    self._paused = True
                case "go_on":
                    self._paused = False

    def _dismiss(self) -> None:
        """Send the workers home and see them go."""
        for seat in self.members.status:
            self.tell(seat, {"op": "stop"})
        for _ in self._until_gone(time.monotonic() + DISMISS_SECONDS):
            pass

    def _until_gone(self, limit: float) -> Iterator[None]:
        while any(seat.alive for seat in self.host.seats.values()):
            left = limit - time.monotonic()
            if left <= 0:
                return  # the host kills whoever is left
            for _ in self.host.events(left):
                yield
