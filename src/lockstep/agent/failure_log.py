"""Failure log: deaths counted, the record of each recovery, and when to stop for good."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from lockstep.agent.local_host import LocalHost, WorkerHandle
from lockstep.agent.membership import Status
from lockstep.agent.observer import RunObserver
from lockstep.agent.recovery import POISON_DEATHS, Resumption
from lockstep.agent.step_log import StepLog
from lockstep.errors import IntegrityError, LockstepError, PoisonError, WorkerLostError
from lockstep.planning.sampling import describe_samples
from lockstep.planning.step_phases import Phase, describe_progress, progress_of
from lockstep.planning.worker_messages import StateCorrupted
from lockstep.state.host_memory import HostMemory

STEP_DEATHS = 40
"""Workers that may die without a step being committed in between before the run stops."""
LOST_LOADERS = 3
"""Loader processes that may die before workers fetch for themselves."""


class FailureLog:
    """Takes note of what goes wrong with the workers of one host, and of what it costs."""

    def __init__(
        self, host: LocalHost, memory: HostMemory, step_log: StepLog, observer: RunObserver
    ) -> None:
        self.host, self.step_log, self.observer = host, step_log, observer
        self.control = memory.control
        self.evaluating = False
        """Whether the workers are at held-out batches, and not at steps."""
        self.has_evaluated = False
        self._without_loader: set[int] = set()
        """Workers, by process id, that have lost a loader process."""
        self._deaths: Counter[tuple[str, int, int]] = Counter()
        self._stalled_for: dict[int, float] = {}
        self._open: list[dict[str, Any]] = []
        self.looked = time.monotonic()
        """When the workers were last looked at: a death since then is noticed at the next look."""

    # Deaths.

    def stalled(self, worker: WorkerHandle, status: Status, seconds: float, reason: str) -> None:
        """Take note that a worker is killed, since it has shown no heartbeat for so long."""
        self.observer.event(
            "stalled",
            **self._where(worker, status),
            reason=reason,
            state=worker.process_state(),
            stack=worker.python_stack(),
        )
        self._stalled_for[worker.worker_id] = seconds

    def died(self, worker: WorkerHandle, status: Status | None) -> None:
        """Take note of a death, and count it.

        Raises:
            PoisonError: the same samples have taken too many workers with them.
            WorkerLostError: too many workers have died since the last committed step.
        """
        now = time.monotonic()
        how = self.host.how_it_ended(worker)
        where = self._where(worker, status)
        if worker.pid in self._without_loader:
            how, where["shard"] = "lost a loader process", None
        waited = self._stalled_for.pop(worker.worker_id, None)
        facts = {**where, "how": how}
        self.observer.event("died", status=status.value if status else None, **facts)
        if status in (Status.WORKING, Status.RESTING):
            detection = waited if waited is not None else now - self.looked
            self._open.append({**facts, "detection_ms": round(detection * 1e3, 2), "at": now})
        if waited is not None:
            how = f"showed no sign of life for {waited:.0f} s"
        for what in ("shard", "batch"):
            if where[what] is not None:
                self._count(what, where["step"], where[what], how)
        if status not in (Status.LEAVING, None):
            self._count_all(where, how)

    def host_died(self, name: str, why: str, silent: float) -> None:
        """Take note of the loss of another host, which had been silent for so many seconds."""
        facts = {"host": name, "worker": None, "step": self.step_log.step, "phase": "host",
                 "shard": None, "batch": None, "how": why}  # fmt: skip
        self._open.append({**facts, "detection_ms": round(silent * 1e3, 2), "at": time.monotonic()})

    def _where(self, worker: WorkerHandle, status: Status | None) -> dict[str, Any]:
        """Which worker, and what it was doing."""
        word, shard = self.control.progress(worker.worker_id), self.control.shard(worker.worker_id)
        step, phase = describe_progress(word)
        batch = None
        if status not in (Status.WORKING, Status.RESTING):
            phase = status.value if status is not None else "away"
            shard = -1
        elif self.evaluating:
            phase, batch, shard = "evaluate", shard if shard >= 0 else None, -1
        elif status is Status.RESTING:
            phase, shard = "rest", -1
        elif self.control.updating(worker.worker_id) == step and word < progress_of(
            step, Phase.UPDATED
        ):
            phase = "update"
        started = word == progress_of(step, Phase.STARTED)
        return {
            "host": self.host.name,
            "worker": worker.worker_id,
            "pid": worker.pid,
            "step": step,
            "phase": phase,
            "shard": shard if started and shard >= 0 else None,
            "batch": batch,
        }

    def _count(self, what: str, step: int, number: int, how: str) -> None:
        """Count the deaths at a shard or a held-out batch; too many are poison."""
        self._deaths[what, step, number] += 1
        if self._deaths[what, step, number] >= POISON_DEATHS:
            raise self._poison(what, step, number, how)

    def _count_all(self, where: dict[str, Any], how: str) -> None:
        """Count the deaths since the last committed step, wherever they happened."""
        step = self.step_log.step
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
            plan = self.step_log.plan
            order = SampleOrder(self.step_log.sampling, plan.part)
            indices = order.indices(step, number).tolist()
            if plan.sample_order:  # only who has the data knows its weights and lengths
                indices = []
        else:
            name, where = f"held-out batch {number} after step {step}", "the held-out set"
            size, most = self.step_log.plan.eval_batch_size, self.step_log.plan.eval_samples
            indices = list(range(number * size, min((number + 1) * size, most)))
        these = f"{describe_samples(indices)}" if indices else "drawn as the task says"
        return PoisonError(
            f"{name} has killed {POISON_DEATHS} workers, one after another",
            found=f"the last one {how}; its samples are {these}",
            fix=f"look at these samples (indices into {where}), then resume the run"
            if indices
            else "have the task print them in loss(), or look at them without sample_weights() and "
            "sample_lengths()",
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

    def recovered(self, committed: float) -> list[dict[str, Any]]:
        """A step was committed at this time: the recoveries that it completes, if any."""
        done = [r for r in self._open if "regroup_ms" in r and committed >= r["at"]]
        self._open = [r for r in self._open if r not in done]
        for record in done:
            since = round((committed - record.pop("at")) * 1e3, 2)
            record["recovery_ms"] = max(since, record["regroup_ms"])  # mended while regrouping
            self.observer.event("recovered", **record)
        return done

    def lost_loader(self, worker: WorkerHandle) -> None:
        """A worker ends itself since one of its loader processes has died. What the loader was at
        is not known; when it has happened too often, workers do without and show it."""
        self._without_loader.add(worker.pid)
        self.observer.event(
            "lost_loader", host=self.host.name, worker=worker.worker_id, pid=worker.pid
        )

    @property
    def loaders_live(self) -> bool:
        """Whether loader processes are worth another try."""
        return len(self._without_loader) < LOST_LOADERS

    @property
    def has_died_since_commit(self) -> bool:
        """Whether a worker has died since the last step that was recorded: it may have been
        fetching a later step's batch."""
        return self._deaths["step", self.step_log.step, 0] > 0

    # Memory.

    def corrupted(self, found: StateCorrupted) -> None:
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

    def evaluated(self) -> None:
        """Held-out data have been evaluated."""
        self.evaluating, self.has_evaluated = False, True

    # Errors of the user's code.

    def raised(self, error: LockstepError, step: int) -> LockstepError:
        """Take note of the error that a worker has reported at a step; returns it."""
        self.step_log.drain()
        self.observer.event("failed", step=step, error=error.what.splitlines()[0])
        return error
