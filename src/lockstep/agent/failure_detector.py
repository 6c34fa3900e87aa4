"""Failure detector: kills the workers of one host that show no heartbeat.

What counts as silence, and for how long it may last, is decided by `stall_policy`; here is who is
looked at, and when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lockstep.agent.failure_log import FailureLog
from lockstep.agent.local_host import LocalHost, WorkerHandle
from lockstep.agent.membership import Status
from lockstep.agent.stall_policy import StallTimeout, stalled
from lockstep.agent.step_log import StepLog
from lockstep.state.control_segment import ControlSegment
from lockstep.system.look_clock import LookClock

ABSENT_SECONDS = 60.0
"""How long a worker may take to start, or to leave."""


class FailureDetector:
    """Watches the heartbeats of one host's workers."""

    def __init__(
        self, host: LocalHost, control: ControlSegment, step_log: StepLog, failure_log: FailureLog
    ) -> None:
        self.host, self.control = host, control
        self.step_log, self.failure_log = step_log, failure_log
        self._silence: dict[int, tuple[object, float]] = {}
        """By worker: a member's last heartbeat, and for how long there has been no other."""
        self._absence: dict[int, tuple[object, float]] = {}
        """The same of those who start or leave."""
        self._clock = LookClock()
        self._passed = 0.0

    def regrouped(self) -> None:
        """Whoever waited for somebody starts afresh."""
        self._silence.clear()

    def kill_stalled(self, working: set[int]) -> None:
        """Kill the workers among `working` that hold the others up and show no sign of life."""
        passed = self._time_passed()
        worker_ids = [worker_id for worker_id in self.step_log.worker_ids if worker_id in working]
        if not worker_ids:
            return
        patience = self.step_log.patience
        silent = []
        for worker_id in worker_ids:
            before, sign = self._silence.get(worker_id), self.control.heartbeat(worker_id)
            silent.append(_silent(self._silence, worker_id, sign, passed))
            if before is not None and before[0] != sign:
                patience.silence_ended(before[1])
        log = self.failure_log
        first = log.evaluating and not log.has_evaluated
        limits = [
            patience.limit(stopped=self._is_stopped(worker_id, seconds), first=first)
            for worker_id, seconds in zip(worker_ids, silent, strict=True)
        ]
        words = [self.control.progress(worker_id) for worker_id in worker_ids]
        if self._await_hosts(worker_ids, words):
            self._silence.clear()
            return
        behind, reason = stalled(words, silent, limits)
        for index in behind:
            if not self._is_stopped(worker_ids[index], silent[index]):
                patience.given_up += 1
            waiting = self._waiting_for(worker_ids[index], worker_ids)
            why = f"{reason}; {waiting}" if waiting else reason
            self._kill(self.host.workers[worker_ids[index]], Status.WORKING, silent[index], why)

    def _waiting_for(self, worker_id: int, members: Sequence[int]) -> str:
        """Who of its team waits for a worker, in words; empty if nobody does."""
        found = []
        for other in members:
            awaited = self.control.awaited_member(other)
            if awaited is not None and awaited[0] == worker_id:
                found.append(f"worker {other} waits for it in a {awaited[1]} pass")
        return ", ".join(found)

    def _await_hosts(self, worker_ids: Sequence[int], words: Sequence[int]) -> bool:
        """Whether those that are furthest behind only wait for other hosts."""
        behind = [
            worker_id
            for worker_id, word in zip(worker_ids, words, strict=True)
            if word == min(words)
        ]
        exchanged = self.control.exchanged
        return all(self.control.awaited_exchange(worker_id) > exchanged for worker_id in behind)

    def kill_absent(self, members: Mapping[int, Status]) -> None:
        """Kill the workers that take too long to start, or to leave when they were sent home.

        Called right after `kill_stalled`.
        """
        for number, status in members.items():
            worker = self.host.workers[number]
            if status in (Status.STARTING, Status.LEAVING) and worker.alive:
                silent = _silent(self._absence, number, (worker.pid, status), self._passed)
                stopped = self._is_stopped(number, silent)
                limit = self.step_log.patience.limit(stopped=True) if stopped else ABSENT_SECONDS
                if silent > limit:
                    self._kill(worker, status, silent, f"{status.value} for {silent:.1f} s")

    def kill_stopped(self, number: int) -> None:
        """Kill a worker that works while all rest, if its process is stopped."""
        sign = self.control.heartbeat(number)
        silent = _silent(self._silence, number, sign, self._time_passed())
        if self._is_stopped(number, silent) and silent > self.step_log.patience.limit(stopped=True):
            reason = f"stopped for {silent:.1f} s while it scored"
            self._kill(self.host.workers[number], Status.RESTING, silent, reason)

    def _time_passed(self) -> float:
        """Seconds since the last look, as far as they count."""
        self._passed = self._clock.passed()
        return self._passed

    def _is_stopped(self, worker_id: int, silent: float) -> bool:
        """Whether the process is stopped; asked only of those that have been silent for long."""
        return silent > StallTimeout.STOPPED / 2 and self.host.workers[worker_id].is_stopped()

    def _kill(self, worker: WorkerHandle, status: Status, silent: float, reason: str) -> None:
        self.failure_log.stalled(worker, status, silent, reason)
        self._silence.pop(worker.worker_id, None)
        worker.kill()


def _silent(
    known: dict[int, tuple[object, float]], worker_id: int, sign: object, passed: float
) -> float:
    """For how many seconds this has been the last sign of life."""
    last, silent = known.get(worker_id, (None, 0.0))
    silent = silent + passed if last == sign else 0.0
    known[worker_id] = (sign, silent)
    return silent
