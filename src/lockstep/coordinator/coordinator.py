"""The coordinator: the master's loop. It grants leases, drains the ring, and acts when all rest.

Workers run by themselves up to the lease. At a *stop* (the end of a data epoch, a checkpoint, the
end) the lease is not extended, all workers come to rest with the state committed, and the
coordinator evaluates, copies the state or ends the run. Its own host's workers are its
`worker_group`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from lockstep.agent import membership
from lockstep.agent.evaluation_rounds import Inferred
from lockstep.agent.local_host import LocalHost
from lockstep.agent.observer import RunObserver
from lockstep.agent.worker_group import WorkerGroup
from lockstep.coordinator.run_control import Request
from lockstep.coordinator.stop_schedule import StopSchedule
from lockstep.errors import StoppedError
from lockstep.planning.plan import Plan
from lockstep.state.control_segment import RING

if TYPE_CHECKING:
    from lockstep.coordinator.host_group import HostGroup

AHEAD_STEPS = (4, RING - 16)
"""The least and the most steps that the lease runs ahead of what has been recorded."""

PARTS_SECONDS, PARTS_SHARE = 10.0, 0.02
"""Between two times at which hosts give the master what each alone has of the state; longer, where
that would take more of a run's time than this share. The loss of a host costs the steps since."""


class Coordinator(WorkerGroup):
    """Runs a plan on a host whose state is set up, from `step` to the plan's end.

    With `hosts` it is the master of several: its own is one of them.
    """

    def __init__(
        self,
        host: LocalHost,
        plan: Plan,
        schedule: StopSchedule,
        observer: RunObserver,
        step: int = 0,
        *,
        warm_up: float = 0.0,
        requests: Callable[[], list[Request]] = list,
        hosts: HostGroup | None = None,
    ) -> None:
        mesh = None if hosts is None else hosts.mesh
        super().__init__(host, plan, observer, step, warm_up=warm_up, mesh=mesh)
        self.schedule, self.hosts = schedule, hosts
        self._requests = requests
        self._stop = schedule.next_stop(step)
        self._checkpointed = self._based = time.monotonic()
        self._gathering = 0.0
        """Seconds: how long the parts of the state were waited for, last."""
        self._checkpoint_asked = self._stop_asked = self._paused = False

    def run(self) -> None:
        """Run to the plan's last step.

        Raises:
            StoppedError: somebody asked to stop; a checkpoint of the last step was given to the
                sink.
            LockstepError: the run cannot go on; what was committed has been given to the sink.
        """
        self._begin()
        while True:
            self._run_to_stop()
            if not self._has_all_parts():
                continue  # a host is lost: the steps since the last base are made once more
            self._at_rest()
            if self._stop_asked:
                self._end()
                raise StoppedError(f"stopped after step {self.step}, as asked")
            if self.step >= self.plan.steps or self._time_is_up():
                break
            self._stop = self.schedule.next_stop(self.step)
            if self.hosts is not None:
                self.hosts.let_in()
            self.grant()
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
            if self.hosts is not None:
                self.hosts.look()
                self.hosts.let_in()
                if self.members.regrouping:
                    self._run_to_stop()
        self._end()

    def _begin(self) -> None:
        self.decide(membership.GroupStarted())
        if self.hosts is not None:
            self.hosts.begin(self)

    def _end(self) -> None:
        self.dismiss()
        if self.hosts is not None:
            self.hosts.end()

    # Compute and synchronise: workers do it by themselves; record, and extend the lease.

    def _run_to_stop(self) -> None:
        """Return when every worker rests at the stop and everything before it is recorded."""
        while True:
            self.listen()
            self._take_requests()
            self.history.drain()
            if self.hosts is not None:
                self.hosts.look()
            self.observer.recovered(self.failures.recovered(self.history.committed_at))
            if self._rest_wanted():
                self._stop = min(self._stop, max(self.control.lease, self.step))
            if self._at_stop():
                return
            self.grant()
            self.watch()

    def _rest_wanted(self) -> bool:
        """Whether the workers shall come to rest before the next stop."""
        if self._checkpoint_due() or self._time_is_up() or self._stop_asked or self._paused:
            return True
        return (
            self.hosts is not None
            and not self.roles.ownership.whole
            and self._parts_due(self.hosts)
        )

    def _parts_due(self, hosts: HostGroup) -> bool:
        """Whether the base is to be brought up to date with what each host alone has: from time to
        time, and before other hosts are let in, which begin with it."""
        pause = max(PARTS_SECONDS, self._gathering / PARTS_SHARE)
        late = self.roles.parted and time.monotonic() - self._based > pause
        return (late or bool(hosts.waiting)) and not self.observer.busy()

    def _at_stop(self) -> bool:
        return (
            not self.members.regrouping
            and self.members.all_rest
            and bool(self._idle)
            and self.step >= self._stop
        )

    def _lease(self) -> int:
        least, most = AHEAD_STEPS
        per_second = self.clock.rate / self.plan.batch_size
        ahead = min(most, least + int(per_second * self.schedule.ahead_seconds))
        return min(self.step + ahead, self._stop)

    def grant(self) -> None:
        super().grant()
        if self.hosts is not None:
            self.hosts.lease(self.control.lease)

    def _torn(self, why: str) -> None:
        assert self.hosts is not None
        self.hosts.torn(why)

    def share_out(self, what: Inferred, number: int, batches: Sequence[int]) -> list[int]:
        if self.hosts is None:
            return list(batches)
        return self.hosts.share_out(what, number, batches)

    def gather(self) -> None:
        if self.hosts is not None:
            self.hosts.gather_batches()

    # At rest: the state is committed and nobody writes to it.

    def _has_all_parts(self) -> bool:
        """Bring the base up to date, where no host has the whole state; False: a host is lost."""
        if self.hosts is None or self.roles.ownership.whole:
            return True
        self.clock.rest()
        self.observer.settle()
        begun = time.monotonic()
        if self.roles.parted and not self.hosts.gather_parts():
            return False
        self.host.base.take(self.step)
        self._based = time.monotonic()
        self._gathering = self._based - begun
        return True

    def _at_rest(self) -> None:
        self.clock.rest()
        if self.schedule.evaluates_at(self.step):
            self.observer.evaluated(self.step, self.evaluation.run())
        if self.schedule.checkpoints_at(self.step) or self._checkpoint_due() or self._stop_asked:
            self._checkpoint()
        if self._paused:
            self._pause()

    def _checkpoint(self) -> None:
        self.observer.checkpoint(*self.snapshot())
        self._checkpointed = time.monotonic()
        self._checkpoint_asked = False

    def _pause(self) -> None:
        """Stay at rest until somebody asks to go on. Workers may come and go meanwhile."""
        self.observer.event("paused", step=self.step)
        while self._paused and not self._stop_asked:
            self.listen()
            self._take_requests()
            self.watch()
            if self._checkpoint_asked and not self.observer.busy():
                self._checkpoint()
        self.observer.event("went_on", step=self.step)

    def _checkpoint_due(self) -> bool:
        every = self.schedule.checkpoint_seconds
        due = every is not None and time.monotonic() - self._checkpointed >= every
        return (due or self._checkpoint_asked) and not self.observer.busy()

    def _time_is_up(self) -> bool:
        limit = self.schedule.seconds
        return limit is not None and self.clock.seconds >= limit

    # Requests.

    def _take_requests(self) -> None:
        for name, number in self._requests():
            self.observer.event("request", request=name, number=number)
            match name:
                case "scale":
                    self.decide(membership.TargetChanged(number))
                case "stop":
                    self._stop_asked = True
                case "checkpoint":
                    self._checkpoint_asked = True
                case "pause":
                    self._paused = True
                case "go_on":
                    self._paused = False
