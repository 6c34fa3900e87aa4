"""Coordinator: the master's loop. It grants leases, drains the ring buffer, and acts at rest.

Workers run by themselves up to the lease. At a *stop* (the end of a data epoch, a checkpoint, the
end) the lease is not extended, all workers come to rest with the state committed, and the
coordinator evaluates, copies the state or ends the run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence

from lockstep.agent import membership
from lockstep.agent.evaluation_rounds import EvaluationRounds, RoundDisturbed
from lockstep.agent.last_state import keep_last_state
from lockstep.agent.observer import RunObserver
from lockstep.agent.worker_group import WorkerGroup
from lockstep.coordinator.checkpoint_timer import CheckpointTimer
from lockstep.coordinator.metric_watch import MetricWatch
from lockstep.coordinator.open_hosts import ReadyHosts
from lockstep.coordinator.run_control import Request
from lockstep.coordinator.stop_schedule import StopSchedule
from lockstep.errors import LockstepError, StoppedError
from lockstep.planning.metric_decisions import Evaluation
from lockstep.state.control_segment import RING

AHEAD_STEPS = (4, RING - 16)
"""The least and the most steps that the lease runs ahead of what has been recorded."""


class Coordinator:
    """Runs a plan on hosts that are set up, from `step` to the plan's end."""

    def __init__(
        self,
        ready: ReadyHosts,
        schedule: StopSchedule,
        observer: RunObserver,
        step: int = 0,
        *,
        warm_up: float = 0.0,
        evaluations: Sequence[Evaluation] = (),
        evaluated: Collection[int] = (),
        requests: Callable[[], list[Request]] = list,
    ) -> None:
        """Take over hosts.

        Args:
            ready: the hosts, with their memory and the plan of the master's own.
            schedule: where to stop, and for what.
            observer: receives the history of the run.
            step: after how many steps the state is.
            warm_up: seconds of steps that do not count to the throughput.
            evaluations: those before `step` that decide something.
            evaluated: after how many steps there has been an evaluation before.
            requests: what has been asked since the last call: to scale, pause, stop, ...
        """
        self.group = WorkerGroup(
            ready.host, ready.memory, ready.own_plan, observer, step,
            lease=self._lease, held=ready.networked, warm_up=warm_up,
        )  # fmt: skip
        self.hosts = ready.lead(self.group)
        self.rounds = EvaluationRounds(self.group, self.hosts.share)
        self.schedule, self.observer = schedule, observer
        self._requests, self._thread = requests, threading.current_thread()
        self._start = step
        waits_for = ready.memory.scheduler_metric if step < ready.own_plan.steps else ""
        self._watch = MetricWatch(ready.own_plan, waits_for, evaluations)
        self.group.told[:] = self._watch.told
        self._tries_evaluation = schedule.evaluate and step == 0
        begins_at_rest = (
            self._tries_evaluation
            or self._watch.stop_reason
            or (step > 0 and schedule.evaluates_at(step) and step not in evaluated)
        )  # what ended the run was an evaluation, or came right after it
        self._stop = step if begins_at_rest else schedule.next_stop(step)
        self._timer = CheckpointTimer(
            schedule.checkpoint_seconds,
            automatic=schedule.automatic,
            state_bytes=ready.memory.state.nbytes,
        )
        self._checkpoint_asked = self._stop_asked = self._paused = False
        self.hosts.stop_wanted(self._stop_wanted)

    @property
    def step(self) -> int:
        """How many steps are committed and recorded."""
        return self.group.step

    @property
    def throughput(self) -> float:
        """Samples per second, the time between rests alone."""
        return self.group.throughput.rate

    def run(self) -> None:
        """Run to the plan's last step.

        Raises:
            StoppedError: somebody asked to stop; a checkpoint of the last step was given to the
                observer.
            LockstepError: the run cannot go on; what was committed has been given to the observer,
                and a checkpoint of the last state that is sound.
        """
        try:
            self._run()
        except StoppedError:
            raise
        except LockstepError as error:
            keep_last_state(self.group, error, self._start)
            raise

    def _run(self) -> None:
        """Run to the plan's last step."""
        self._begin()
        while True:
            self._run_to_stop()
            if not self.hosts.parts.collect():
                continue  # a host is lost: the steps since the last snapshot are made once more
            try:
                self._at_rest()
            except RoundDisturbed:
                continue  # hosts are regrouped, and then it is evaluated once more
            if self._stop_asked:
                self._end()
                raise StoppedError(f"stopped after step {self.step}, as asked")
            if self.step >= self.group.plan.steps or self._time_is_up() or self._watch.stop_reason:
                break
            self._stop = self.schedule.next_stop(self.step)
            self.hosts.let_in()
            self._grant()
        self._end()

    def run_at_rest(self, rounds: Iterable[object]) -> None:
        """Gather the workers, do so many rounds of something while they rest, and send them home.
        Between two rounds hosts and workers may come and go.

        Raises:
            StoppedError: somebody asked to stop.
            LockstepError: it cannot be done.
        """
        self._begin()
        self._run_to_stop()
        for _ in rounds:
            self._take_requests()
            if self._stop_asked:
                self._end()
                raise StoppedError("stopped, as asked")
            self.hosts.look()
            self.hosts.let_in()
            if self.group.members.regrouping:
                self._run_to_stop()
        self._end()

    def _begin(self) -> None:
        self.group.decide(membership.GroupStarted())
        self.hosts.begin()

    def _end(self) -> None:
        self.group.dismiss()
        self.hosts.end()

    # Compute and synchronise: workers do it by themselves; record, and extend the lease.

    def _run_to_stop(self) -> None:
        """Return when every worker rests at the stop and everything before it is recorded."""
        group = self.group
        while True:
            group.listen()
            self._take_requests()
            group.step_log.drain()
            self.hosts.look()
            self.observer.recovered(group.failure_log.recovered(group.step_log.committed_at))
            if self._rest_wanted():
                self._stop = min(self._stop, max(group.control.lease, self.step))
            elif self._may_checkpoint():
                epoch_end = self.schedule.epoch_end(max(group.control.lease, self.step))
                self._stop = min(self._stop, epoch_end)
            if group.at_rest and group.idle and self.step >= self._stop:
                return
            self._grant()
            group.watch()

    def _rest_wanted(self) -> bool:
        """Whether the workers shall come to rest before the next stop."""
        if self._checkpoint_due() or self._time_is_up() or self._stop_asked or self._paused:
            return True
        return self.hosts.parts.due()

    def _lease(self) -> int:
        """The lease policy: some steps ahead of what has been recorded, up to the stop."""
        least, most = AHEAD_STEPS
        per_second = self.throughput / self.group.plan.batch_size
        ahead = min(most, least + int(per_second * self.schedule.ahead_seconds))
        return min(self.step + ahead, self._stop)

    def _grant(self) -> None:
        self.group.grant()
        self.hosts.lease(self.group.control.lease)

    # At rest: the state is committed and nobody writes to it.

    def _at_rest(self) -> None:
        self.group.throughput.rest()
        if self._tries_evaluation:  # what is broken in it shows now, and not after an epoch
            self._try_evaluation()
            self._tries_evaluation = False
        self._watch.improved = False
        if self.schedule.evaluates_at(self.step):
            self._evaluate()
        ends = self.step == self.schedule.epoch_end(self.step) and self._may_checkpoint()
        asked = self.schedule.checkpoints_at(self.step) or self._stop_asked
        asked = asked or self._watch.improved or bool(self._watch.stop_reason)
        if ends or asked or self._checkpoint_due():
            self._checkpoint()
        if self._paused:
            self._pause()

    def _try_evaluation(self) -> None:
        """Evaluate one batch, and see whether the metrics that somebody goes by are there. Those of
        `Task.score` are not known yet."""
        found = self.rounds.evaluate_one()
        if not found["outputs"]:
            self._watch.check_names(found["sums"])

    def _evaluate(self) -> None:
        step, metrics = self.step, self.rounds.evaluate()
        self.observer.evaluated(step, metrics)
        self._watch.take(Evaluation(step=step, metrics=metrics))
        for told in self._watch.told[-1:]:
            self.group.tell_metric(told)
            self.hosts.tell_metric(told)
        if self._watch.stop_reason and step < self.group.plan.steps:
            self.rounds.baseline()
            self.observer.event("stopped_early", step=step, reason=self._watch.stop_reason)

    def _checkpoint(self) -> None:
        begun = time.monotonic()
        self.observer.checkpoint(*self.group.take_snapshot())
        self._timer.taken(time.monotonic() - begun, self.observer.writing_seconds)
        self._checkpoint_asked = False

    def _pause(self) -> None:
        """Stay at rest until somebody asks to go on. Workers may come and go meanwhile."""
        self.observer.event("paused", step=self.step)
        while self._paused and not self._stop_asked:
            self.group.listen()
            self._take_requests()
            self.group.watch()
            if self._checkpoint_asked and not self.observer.busy():
                self._checkpoint()
        self.observer.event("went_on", step=self.step)

    def _checkpoint_due(self) -> bool:
        return (self._timer.due or self._checkpoint_asked) and not self.observer.busy()

    def _may_checkpoint(self) -> bool:
        """Whether one may be written at the end of a data epoch, though nobody has asked."""
        return self._timer.affordable and not self.observer.busy()

    def _time_is_up(self) -> bool:
        limit = self.schedule.seconds
        return limit is not None and self.group.throughput.seconds >= limit

    # Requests.

    def _stop_wanted(self) -> bool:
        """Whether somebody has asked to stop, by now."""
        if threading.current_thread() is self._thread:
            self._take_requests()
        return self._stop_asked

    def _take_requests(self) -> None:
        for request in self._requests():
            self.observer.event("request", request=request.name, number=request.number)
            match request.name:
                case "scale":
                    self.group.decide(membership.TargetChanged(request.number))
                case "stop":
                    self._stop_asked = True
                case "checkpoint":
                    self._checkpoint_asked = True
                case "pause":
                    self._paused = True
                case "go_on":
                    self._paused = False
