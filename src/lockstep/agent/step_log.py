"""Step log: committed steps, from the ring buffer to the observer, in order."""

from __future__ import annotations

import math
import time
from collections.abc import Container

from blake3 import blake3

from lockstep.agent.observer import RunObserver
from lockstep.agent.recovery import step_in_flight
from lockstep.agent.stall_policy import StallTimeout
from lockstep.planning.digest_sample import plan_digest_sample
from lockstep.planning.plan import Plan
from lockstep.planning.step_phases import Phase, progress_of
from lockstep.results.ledger import StepRecord
from lockstep.state.control_segment import DIGEST_BYTES, RING
from lockstep.state.host_memory import HostMemory
from lockstep.state.shard_outcomes import weighted_means

MARK_STEPS, MARKS = 64, 64
"""Of every so many steps a digest is kept, of so many of them."""


class StepLog:
    """Drains the ring buffer: every step once, when all members have committed and digested it."""

    def __init__(
        self,
        memory: HostMemory,
        plan: Plan,
        observer: RunObserver,
        throughput: Throughput,
        step: int,
    ) -> None:
        self.plan, self.observer, self.throughput = plan, observer, throughput
        self.control, self._state = memory.control, memory.state
        self.digest_sample = plan_digest_sample(memory.layout)
        self.step = step
        """How many steps are committed and recorded."""
        self.worker_ids: tuple[int, ...] = ()
        """The membership in force."""
        self.loss = float("nan")
        self.committed_at = 0.0
        """When the last recorded step was committed, by the monotonic clock."""
        self.owned: Container[int] = ()
        """The parameters that some host alone updates: it tells its digests before the commit."""
        self.marks: dict[int, str] = {}
        """Digests of what was recorded of every 64th step, the newest ones: other hosts must have
        recorded the same."""
        self.patience = StallTimeout(plan.stall_seconds)
        self.sampling = plan.sampling

    def drain(self) -> None:
        """Give every step that all members have committed and digested to the observer."""
        if not self.worker_ids:
            return
        self._drain_to(min(self.control.progress(worker_id) for worker_id in self.worker_ids))

    def in_flight(self) -> int:
        """The first step that the membership in force has not committed."""
        return step_in_flight([self.control.progress(worker_id) for worker_id in self.worker_ids])

    def mend(self, step: int) -> None:
        """Record all steps before `step`, though somebody has not digested its share of the last.

        Called when nothing of `step` has been applied and nobody can do so meanwhile: the state is
        that after the step before.
        """
        self.drain()
        if self.step < step:
            self._drain_to(progress_of(step - 1, Phase.STARTED))
            state = memoryview(self._state.map)
            _, everybodys = self.digest_sample.split(step - 1, self.owned)
            for index, unit in everybodys.items():
                digest = blake3(state[unit.offset : unit.offset + unit.nbytes]).digest(DIGEST_BYTES)
                self.control.set_digest(step - 1, index, digest)
            self.control.times[(step - 1) % RING] = time.perf_counter()
            self._drain_to(progress_of(step, Phase.STARTED))

    def settle(self, step: int) -> None:
        """The state is that after `step` steps now: record those before it. A host that has just
        joined has nothing to record."""
        if self.worker_ids:
            self.mend(step)
        else:
            self.step = step

    def _drain_to(self, reached: int) -> None:
        first = self.step
        while self.step < self.plan.steps and progress_of(self.step + 1, Phase.STARTED) <= reached:
            self._record(self.step)
            self.step += 1
        if self.step > first:
            self.observer.progress(self.step, self.loss, self.throughput.rate, len(self.worker_ids))

    def _record(self, step: int) -> None:
        control, place = self.control, step % RING
        size = self.sampling.batch_samples(step)
        loss, logged = weighted_means(control, step, self.sampling.weights(step))
        units = {
            unit.name: control.digest(step, index)
            for index, unit in enumerate(self.digest_sample.units(step))
        }
        norm = None if self.plan.sum_limit is None else float(control.total_norms[place])
        rate = float(control.learning_rates[place])
        if step == 0:
            self.observer.event("first_step")
        record = StepRecord(
            step=step,
            data_epoch=self.sampling.data_epoch(step),
            samples=size,
            loss=loss,
            logged=logged,
            units=units,
            norm=norm,
            lr=None if math.isnan(rate) else rate,
        )
        self.observer.commit(record)
        if step % MARK_STEPS == 0:
            self.marks[step] = blake3(record.body().encode()).hexdigest(16)
            self.marks.pop(step - MARKS * MARK_STEPS, None)
        self.committed_at = float(control.times[place])
        self.patience.step_took(self.throughput.committed(self.committed_at, size))
        self.loss = loss


class Throughput:
    """Counts samples and seconds between commits.

    The time between rests counts, from the first commit after each rest on; the first `warm_up`
    seconds do not.
    """

    def __init__(self, warm_up: float = 0.0) -> None:
        self.samples, self.seconds = 0, 0.0
        self._warm_up = warm_up
        self._begun: float | None = None
        self._last: float | None = None

    def committed(self, at: float, samples: int) -> float:
        """Count a step of so many samples, committed at this time; returns how long it took."""
        self._begun = at if self._begun is None else self._begun
        took = at - self._last if self._last is not None else 0.0
        if self._last is not None and at - self._begun >= self._warm_up:
            self.samples += samples
            self.seconds += took
        self._last = at
        return took

    def rest(self) -> None:
        """Leave the time until the next commit out."""
        self._last = None

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.samples / self.seconds if self.seconds else 0.0
