"""The coordinator: the master's loop. It grants leases, drains the ring, and decides at rest.

Workers run by themselves up to the lease. At a *stop* (the end of a data epoch, a checkpoint, the
end) the lease is not extended, all workers come to rest with the state committed, and the
coordinator evaluates, copies the state or ends the run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from lockstep.channel import Message
from lockstep.checkpoint import non_finite_tensors
from lockstep.control import RING, Phase, describe_progress, progress_of
from lockstep.errors import NonFiniteError, NumericsError, WorkerLostError, from_message
from lockstep.evaluate import BatchSums, batch_count, combine
from lockstep.host import Event, Host, Seat
from lockstep.ledger import StepRecord
from lockstep.planning import Plan
from lockstep.sampling import Sampling, home_shards
from lockstep.sink import Sink

TICK = 0.05
"""Seconds between two looks at the ring."""
AHEAD_STEPS = (4, RING - 16)
"""The least and the most steps that the lease runs ahead of what has been recorded."""
HELLO_SECONDS = 120.0
DISMISS_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """At which steps the run comes to rest, and for what."""

    steps: int
    steps_per_epoch: int
    evaluate: bool
    checkpoint_steps: int | None
    checkpoint_seconds: float | None
    seconds: float | None = None
    """Stop for good after so many seconds, at the next step's end."""
    ahead_seconds: float = 0.5
    """How far the lease runs ahead of what has been recorded."""

    def evaluates_at(self, step: int) -> bool:
        """Whether held-out data are evaluated after `step` committed steps."""
        ends = step == self.steps or (step > 0 and step % self.steps_per_epoch == 0)
        return self.evaluate and ends

    def checkpoints_at(self, step: int) -> bool:
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


class Clock:
    """The rate of the run, from the commit times that the workers record.

    The time between rests counts, from the first commit after each rest on; the first
    `warm_up` seconds do not.
    """

    def __init__(self, warm_up: float = 0.0) -> None:
        self.samples, self.seconds = 0, 0.0
        self._warm_up = warm_up
        self._begun: float | None = None
        self._last: float | None = None

    def committed(self, at: float, samples: int) -> None:
        """Count a step of so many samples, committed at this time."""
        self._begun = at if self._begun is None else self._begun
        if self._last is not None and at - self._begun >= self._warm_up:
            self.samples += samples
            self.seconds += at - self._last
        self._last = at

    def rest(self) -> None:
        """Leave the time until the next commit out."""
        self._last = None

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.samples / self.seconds if self.seconds else 0.0


class Coordinator:
    """Runs a plan on a host whose state is set up, from `step` to the plan's end."""

    def __init__(
        self,
        host: Host,
        plan: Plan,
        schedule: Schedule,
        sink: Sink,
        step: int = 0,
        warm_up: float = 0.0,
    ) -> None:
        assert host.layout is not None
        self.host, self.plan, self.schedule, self.sink = host, plan, schedule, sink
        self.step = step
        """How many steps are committed and recorded."""
        self.clock = Clock(warm_up)
        self.control = host.control
        self.audit = host.layout.audit()
        self.sampling = Sampling(
            samples=plan.train_samples,
            batch_size=plan.batch_size,
            shards=plan.shards,
            seed=plan.seed,
        )
        self._stop = schedule.next_stop(step)
        self._idle: dict[int, int] = {}
        self._checkpointed = self._begun = time.monotonic()
        self._loss = float("nan")

    def run(self) -> None:
        """Run to the plan's last step.

        Raises:
            LockstepError: the run cannot go on; what was committed has been given to the sink.
        """
        self._initialise()
        self._join()
        self._begun = time.monotonic()
        while True:
            self._run_to_stop()
            self._at_rest()
            if self.step >= self.plan.steps or self._time_is_up():
                break
            self._stop = self.schedule.next_stop(self.step)
            self._grant()
        self._dismiss()

    # Initialise: fork the workers, compare what they compute, give each its part.

    def _initialise(self) -> None:
        waiting = set(range(self.plan.workers))
        for number in sorted(waiting):
            self.host.spawn(number)
        limit = time.monotonic() + HELLO_SECONDS
        while waiting:
            for event in self._events(limit, "the workers' first word"):
                message = self._checked(event)
                if message["event"] == "hello":
                    self._admit(event.seat, str(message["probe"]))
                    waiting.discard(event.seat.number)

    def _admit(self, seat: Seat, probe: str) -> None:
        expected = self.host.facts["probe"]
        if probe != expected and self.plan.threads == 1:
            raise NumericsError(
                f"worker {seat.number} does not compute the same bits as the nursery",
                expected=f"probe {expected}",
                found=f"probe {probe}",
                fix="run with --numerics portable",
            )
        self.sink.event("joined", worker=seat.number, pid=seat.pid, probe=probe)

    def _join(self) -> None:
        seats = sorted(self.host.seats)
        for number in seats:
            self.control.set_progress(number, progress_of(self.step, Phase.STARTED))
        self._grant()
        for rank, number in enumerate(seats):
            self.host.seats[number].channel.send(
                {
                    "op": "join",
                    "epoch": self.control.epoch,
                    "seats": seats,
                    "step": self.step,
                    "todo": list(home_shards(self.plan.shards, len(seats), rank)),
                    "resume_update": False,
                }
            )

    # Compute and synchronise: workers do it by themselves; record, and extend the lease.

    def _run_to_stop(self) -> None:
        """Return when every worker rests at the stop and everything before it is recorded."""
        while True:
            for event in self.host.events(TICK):
                message = self._checked(event)
                if message["event"] == "idle":
                    self._idle[event.seat.number] = message["step"]
            self._drain()
            if self._checkpoint_due() or self._time_is_up():
                self._stop = min(self._stop, max(self.control.lease, self.step))
            if self.step >= self._stop and len(self._idle) == len(self.host.seats):
                return
            self._grant()

    def _grant(self) -> None:
        """Extend the lease as far as it may go, and wake the workers that rest below it."""
        least, most = AHEAD_STEPS
        per_second = self.clock.rate / self.plan.batch_size
        ahead = min(most, least + int(per_second * self.schedule.ahead_seconds))
        lease = max(self.control.lease, min(self.step + ahead, self._stop))
        self.control.lease = lease
        for number, step in list(self._idle.items()):
            if step < lease:
                self.host.seats[number].channel.send({"op": "run"})
                del self._idle[number]

    def _drain(self) -> None:
        """Give every step that all workers have committed and digested to the sink."""
        reached = min(self.control.progress(number) for number in self.host.seats)
        first = self.step
        while self.step < self.plan.steps and progress_of(self.step + 1, Phase.STARTED) <= reached:
            self._record(self.step)
            self.step += 1
        if self.step > first:
            workers = len(self.host.seats)
            self.sink.progress(self.step, self._loss, self.clock.rate, workers)

    def _record(self, step: int) -> None:
        record = self.control.record(step)
        size = self.sampling.batch_samples(step)
        loss = 0.0
        for shard, value in enumerate(record["losses"].tolist()):
            loss += value * (self.sampling.shard_samples(step, shard) / size)
        units = {
            unit.name: record["digests"][index].tobytes().hex()
            for index, unit in enumerate(self.audit.units(step))
        }
        if step == 0:
            self.sink.event("first_step")
        self.sink.commit(
            StepRecord(
                step=step,
                data_epoch=self.sampling.data_epoch(step),
                samples=size,
                loss=loss,
                units=units,
                norm=float(record["norm"]) if self.plan.clip_grad_norm is not None else None,
            )
        )
        self.clock.committed(float(record["time"]), size)
        self._loss = loss

    # At rest: the state is committed and nobody writes to it.

    def _at_rest(self) -> None:
        self.clock.rest()
        if self.schedule.evaluates_at(self.step):
            self.sink.evaluated(self.step, self._evaluate())
        if self.schedule.checkpoints_at(self.step) or self._checkpoint_due():
            self.sink.checkpoint(self.step, self.snapshot())
            self._checkpointed = time.monotonic()

    def snapshot(self) -> bytes:
        """A copy of the state segment. Called when every worker rests."""
        return self.host.state.map[: self.host.state.nbytes]

    def _checkpoint_due(self) -> bool:
        every = self.schedule.checkpoint_seconds
        return every is not None and time.monotonic() - self._checkpointed >= every

    def _time_is_up(self) -> bool:
        limit = self.schedule.seconds
        return limit is not None and time.monotonic() - self._begun >= limit

    def _evaluate(self) -> dict[str, float]:
        """The held-out metrics of the state at rest; each batch by one worker."""
        total = batch_count(self.plan.eval_samples, self.plan.eval_batch_size)
        seats = sorted(self.host.seats)
        results: list[BatchSums] = []
        waiting = set(seats)
        for rank, number in enumerate(seats):
            batches = list(range(rank, total, len(seats)))
            self.host.seats[number].channel.send({"op": "evaluate", "batches": batches})
        while waiting:
            for event in self.host.events(TICK):
                message = self._checked(event)
                if message["event"] == "evaluated":
                    results += message["results"]
                    waiting.discard(event.seat.number)
        return combine(results)

    def _dismiss(self) -> None:
        """Send the workers home and see them go."""
        for seat in self.host.seats.values():
            seat.channel.send({"op": "stop"})
        limit = time.monotonic() + DISMISS_SECONDS
        while any(seat.alive for seat in self.host.seats.values()):
            for _ in self._events(limit, "the workers to end"):
                pass

    # What the workers say.

    def _events(self, limit: float, what: str) -> Iterator[Event]:
        left = limit - time.monotonic()
        if left <= 0:
            raise WorkerLostError("a worker fell silent", expected=what, found="nothing in time")
        yield from self.host.events(left)

    def _checked(self, event: Event) -> Message:
        """The event's message; raises what the worker raised, or its death."""
        seat = event.seat
        if event.message is None:
            step, phase = describe_progress(self.control.progress(seat.number))
            raise WorkerLostError(
                f"worker {seat.number} (pid {seat.pid}) {self.host.how_it_ended(seat)}",
                found=f"it was in step {step}, phase {phase}",
                fix="look for the out-of-memory killer, or for native code that crashes",
            )
        if event.message["event"] == "failed":
            error = from_message(event.message["error"])
            self._drain()
            self.sink.event("failed", worker=seat.number, step=event.message["step"])
            if isinstance(error, NonFiniteError):
                self._save_last_good()
            raise error
        return event.message

    def _save_last_good(self) -> None:
        """Keep the state before a step whose loss is not finite, if it is sound itself."""
        state = self.snapshot()
        assert self.host.layout is not None
        broken = non_finite_tensors(self.host.layout, state)
        if broken:
            self.sink.event("not_saved", step=self.step, tensors=broken[:5])
        else:
            self.sink.checkpoint(self.step, state)
