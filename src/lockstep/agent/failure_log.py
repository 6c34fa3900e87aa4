"""Failures: who died where, who has stalled, what it cost; and when to stop for good."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lockstep.agent.local_host import LocalHost, WorkerHandle
from lockstep.agent.membership import Status
from lockstep.agent.observer import RunObserver
from lockstep.agent.recovery import POISON_DEATHS, Resumption
from lockstep.agent.stall_policy import StallTimeout, stalled
from lockstep.agent.step_log import StepLog
from lockstep.errors import (
    IntegrityError,
    LockstepError,
    NonFiniteError,
    PoisonError,
    WorkerLostError,
)
from lockstep.planning.step_phases import Phase, describe_progress, progress_of
from lockstep.planning.worker_messages import StateCorrupted
from lockstep.state.fingerprint import non_finite_tensors

STEP_DEATHS = 40
"""Workers that may die without a step being committed in between before the run stops."""
LOST_LOADERS = 3
"""Loader processes that may die before workers fetch for themselves."""
Snapshot = Callable[[], tuple[int, memoryview]]
"""Takes the state when nobody writes to it, and says after how many steps it is."""
ABSENT_SECONDS = 60.0
"""How long a worker may take to start, or to leave."""
LONGEST_LOOK = 0.5
"""Seconds: no more than this is counted as silence between two looks at the workers."""


class FailureLog:
    """Watches the workers of one host and keeps the record of each recovery."""

    def __init__(self, host: LocalHost, history: StepLog, observer: RunObserver) -> None:
        self.host, self.history, self.observer = host, history, observer
        self.control = host.control
        self.evaluating = False
        """Whether the workers are at held-out batches, and not at steps."""
        self._evaluated = False
        self._silence: dict[int, tuple[object, float]] = {}
        """By seat: a member's last sign of life, and for how long there has been no other."""
        self._absence: dict[int, tuple[object, float]] = {}
        """The same of those who start or leave."""
        self._without_loader: set[int] = set()
        """Workers, by process id, that have lost a loader process."""
        self._watched = time.monotonic()
        self._deaths: Counter[tuple[str, int, int]] = Counter()
        self._stalled_for: dict[int, float] = {}
        self._open: list[dict[str, Any]] = []
        self.looked = time.monotonic()
        """When the workers were last looked at: a death since then is noticed at the next look."""

    # Deaths.

    def died(self, worker_id: WorkerHandle, status: Status | None, snapshot: Snapshot) -> None:
        """Take note of a death, and count it.

        Raises:
            PoisonError: the same samples have taken too many workers with them.
            WorkerLostError: too many workers have died since the last committed step.
        """
        now = time.monotonic()
        how = self.host.how_it_ended(worker_id)
        where = self._where(worker_id, status)
        if worker_id.pid in self._without_loader:
            how, where["shard"] = "lost a loader process", None
        waited = self._stalled_for.pop(worker_id.number, None)
        self._silence.clear()  # whoever waited for it starts afresh
        facts = {**where, "how": how}
        self.observer.event("died", status=status.value if status else None, **facts)
        if status in (Status.WORKING, Status.RESTING):
            detection = waited if waited is not None else now - self.looked
            self._open.append({**facts, "detection_ms": round(detection * 1e3, 2), "at": now})
        if waited is not None:
            how = f"showed no sign of life for {waited:.0f} s"
        for what in ("shard", "batch"):
            if where[what] is not None:
                self._count(what, where["step"], where[what], how, snapshot)
        if status not in (Status.LEAVING, None):
            self._count_all(where, how)

    def host_died(self, name: str, why: str, silent: float) -> None:
        """Take note of the loss of another host, which had been silent for so many seconds."""
        facts = {"host": name, "worker": None, "step": self.history.step, "phase": "host",
                 "shard": None, "batch": None, "how": why}  # fmt: skip
        self._open.append({**facts, "detection_ms": round(silent * 1e3, 2), "at": time.monotonic()})

    def _where(self, worker_id: WorkerHandle, status: Status | None) -> dict[str, Any]:
        """Which worker, and what it was doing."""
        word, shard = self.control.progress(worker_id.number), self.control.shard(worker_id.number)
        step, phase = describe_progress(word)
        batch = None
        if status not in (Status.WORKING, Status.RESTING):
            phase = status.value if status is not None else "away"
            shard = -1
        elif self.evaluating:
            phase, batch, shard = "evaluate", shard if shard >= 0 else None, -1
        elif status is Status.RESTING:
            phase, shard = "rest", -1
        elif self.control.updating(worker_id.number) == step and word < progress_of(
            step, Phase.UPDATED
        ):
            phase = "update"
        started = word == progress_of(step, Phase.STARTED)
        return {
            "host": self.host.name,
            "worker": worker_id.number,
            "pid": worker_id.pid,
            "step": step,
            "phase": phase,
            "shard": shard if started and shard >= 0 else None,
            "batch": batch,
        }

    def _count(self, what: str, step: int, number: int, how: str, snapshot: Snapshot) -> None:
        """Count the deaths at a shard or a held-out batch; too many are poison."""
        self._deaths[what, step, number] += 1
        if self._deaths[what, step, number] < POISON_DEATHS:
            return
        if what == "shard":  # nobody can have gone past the shard: the state is that before it
            self._keep(step, snapshot)
        raise self._poison(what, step, number, how)

    def _count_all(self, where: dict[str, Any], how: str) -> None:
        """Count the deaths since the last committed step, wherever they happened."""
        step = self.history.step
        self._deaths["step", step, 0] += 1
        if self._deaths["step", step, 0] >= STEP_DEATHS:
            raise WorkerLostError(
                f"{STEP_DEATHS} workers have died, and step {step} is not committed yet",
                expected="workers that live",
                found=f"the last one, at step {where['step']} in phase {where['phase']}, {how}",
                fix="look for the out-of-memory killer, or for native code that crashes; "
                "then resume the run",
            )

    def _poison(self, what: str, step: int, number: int, how: str) -> PoisonError:
        from lockstep.data.sample_order import SampleOrder

        if what == "shard":
            name, where = f"shard {number} of step {step}", "the training set"
            order = SampleOrder(self.history.sampling, self.history.plan.part)
            indices = order.indices(step, number).tolist()
        else:
            name, where = f"held-out batch {number} after step {step}", "the held-out set"
            size, most = self.history.plan.eval_batch_size, self.history.plan.eval_samples
            indices = list(range(number * size, min((number + 1) * size, most)))
        listed = ", ".join(map(str, indices[:16])) + (", …" if len(indices) > 16 else "")
        return PoisonError(
            f"{name} has killed {POISON_DEATHS} workers, one after another",
            found=f"the last one {how}; its samples are {listed}",
            fix=f"look at these samples (indices into {where}), then resume the run",
        )

    def regrouped(self, resumption: Resumption) -> None:
        """A new membership goes on from here."""
        now = time.monotonic()
        for record in self._open:
            if "regroup_ms" in record:
                continue  # a replacement joins before a step could be committed
            record["regroup_ms"] = round((now - record["at"]) * 1e3, 2)
            record["recomputed"] = sum(map(len, resumption.todo))
            record["steps_back"] = resumption.back or 0
        self._silence.clear()

    def recovered(self, committed: float) -> list[dict[str, Any]]:
        """A step was committed at this time: the recoveries that it completes, if any."""
        done = [r for r in self._open if "regroup_ms" in r and committed >= r["at"]]
        self._open = [r for r in self._open if r not in done]
        for record in done:
            since = round((committed - record.pop("at")) * 1e3, 2)
            record["recovery_ms"] = max(since, record["regroup_ms"])  # mended while regrouping
            self.observer.event("recovered", **record)
        return done

    def lost_loader(self, worker_id: WorkerHandle) -> None:
        """A worker ends itself since one of its loader processes has died. What the loader was at
        is not known; when it has happened too often, workers do without and show it."""
        self._without_loader.add(worker_id.pid)
        self.observer.event(
            "lost_loader", host=self.host.name, worker=worker_id.number, pid=worker_id.pid
        )

    @property
    def loaders_live(self) -> bool:
        """Whether loader processes are worth another try."""
        return len(self._without_loader) < LOST_LOADERS

    # Memory.

    def spoilt(self, found: StateCorrupted) -> None:
        """The state was found changed: gradients may come from it, and none of them counts.

        Nobody computes: the worker that found it has passed the step's first meeting.

        Raises:
            IntegrityError: it happens at the same step time and again.
        """
        step = found.step
        self.control.shard_done[:] = -1
        self._deaths["state", step, 0] += 1
        if self._deaths["state", step, 0] >= POISON_DEATHS:
            raise IntegrityError(
                f"the state changed in memory {POISON_DEATHS} times between steps {step - 1} "
                f"and {step}",
                expected="the bytes that were committed",
                found=f"others in {found.tensor}, elements {list(found.elements)}, or its "
                "optimizer state",
                fix="look for faulty memory; then resume the run from its last checkpoint",
            )

    # Stalls.

    def kill_stalled(self, working: set[int]) -> None:
        """Kill the workers among `working` that hold the others up and show no sign of life."""
        passed = self._time_passed()
        worker_ids = [worker_id for worker_id in self.history.worker_ids if worker_id in working]
        if not worker_ids:
            return
        patience = self.history.patience
        silent = []
        for worker_id in worker_ids:
            before, sign = self._silence.get(worker_id), self.control.sign_of_life(worker_id)
            silent.append(_silent(self._silence, worker_id, sign, passed))
            if before is not None and before[0] != sign:
                patience.silence_ended(before[1])
        first = self.evaluating and not self._evaluated
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
            self._kill(
                self.host.worker_ids[worker_ids[index]], Status.WORKING, silent[index], reason
            )

    def _await_hosts(self, worker_ids: Sequence[int], words: Sequence[int]) -> bool:
        """Whether those that are furthest behind only wait for other hosts."""
        behind = [
            worker_id
            for worker_id, word in zip(worker_ids, words, strict=True)
            if word == min(words)
        ]
        exchanged = self.control.exchanged
        return all(self.control.asked(worker_id) > exchanged for worker_id in behind)

    def kill_absent(self, members: Mapping[int, Status]) -> None:
        """Kill the workers that take too long to start, or to leave when they were sent home.

        Called right after `kill_stalled`.
        """
        for number, status in members.items():
            worker_id = self.host.worker_ids[number]
            if status in (Status.STARTING, Status.LEAVING) and worker_id.alive:
                silent = _silent(self._absence, number, (worker_id.pid, status), self._passed)
                stopped = self._is_stopped(number, silent)
                limit = self.history.patience.limit(stopped=True) if stopped else ABSENT_SECONDS
                if silent > limit:
                    self._kill(worker_id, status, silent, f"{status.value} for {silent:.1f} s")

    def kill_stopped(self, number: int) -> None:
        """Kill a worker that works while all rest, if its process is stopped."""
        sign = self.control.sign_of_life(number)
        silent = _silent(self._silence, number, sign, self._time_passed())
        if self._is_stopped(number, silent) and silent > self.history.patience.limit(stopped=True):
            reason = f"stopped for {silent:.1f} s while it scored"
            self._kill(self.host.worker_ids[number], Status.RESTING, silent, reason)

    def _time_passed(self) -> float:
        """Seconds since the last look, as far as they count: who was stopped itself, with the
        whole job or by a slow disk, cannot tell that others were silent."""
        now = time.monotonic()
        self._passed, self._watched = min(now - self._watched, LONGEST_LOOK), now
        return self._passed

    def _is_stopped(self, worker_id: int, silent: float) -> bool:
        """Whether the process is stopped; asked only of those that have been silent for long."""
        return silent > StallTimeout.STOPPED / 2 and self.host.worker_ids[worker_id].is_stopped()

    def _kill(self, worker_id: WorkerHandle, status: Status, silent: float, reason: str) -> None:
        self.observer.event(
            "stalled",
            **self._where(worker_id, status),
            reason=reason,
            state=worker_id.process_state(),
            stack=worker_id.python_stack(),
        )
        self._stalled_for[worker_id.number] = silent
        self._silence.pop(worker_id.number, None)
        worker_id.kill()

    def evaluated(self) -> None:
        """Held-out data have been evaluated."""
        self.evaluating, self._evaluated = False, True

    # Errors of the user's code.

    def raised(self, error: LockstepError, step: int, snapshot: Snapshot) -> LockstepError:
        """The error that a worker has reported at a step. The state before a loss that is not
        finite is kept."""
        self.history.drain()
        self.observer.event("failed", step=step, error=error.what.splitlines()[0])
        if isinstance(error, NonFiniteError):
            self._keep(step, snapshot)
        return error

    def _keep(self, step: int, snapshot: Snapshot) -> None:
        """Keep the state before a step in flight as a checkpoint, if it is sound itself.

        Nobody rests, and yet nobody writes to the state: whoever computes has passed the commit of
        the step before, so that is whole, and the others cannot use this step's gradients before
        all are there. Some may not have digested the step before: that is made up for.
        """
        if step != self.history.in_flight():
            return
        self.history.mend(step)
        step, state = snapshot()
        assert self.host.layout is not None
        broken = non_finite_tensors(self.host.layout, state)
        if broken:
            self.observer.event("not_saved", step=step, tensors=broken[:5])
        else:
            self.observer.checkpoint(step, state)


def _silent(
    known: dict[int, tuple[object, float]], worker_id: int, sign: object, passed: float
) -> float:
    """For how many seconds this has been the last sign of life."""
    last, silent = known.get(worker_id, (None, 0.0))
    silent = silent + passed if last == sign else 0.0
    known[worker_id] = (sign, silent)
    return silent
