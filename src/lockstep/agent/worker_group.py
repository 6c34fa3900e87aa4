"""Worker group: one host's workers, supervised by its agent.

Workers run by themselves up to the lease. Who they are is decided by `membership`, and where they
go on after a change by `recovery`; here is the I/O of both. What has to do with other hosts is in
`host_regroup`, and held-out data in `evaluation_rounds`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable

from lockstep.agent import membership
from lockstep.agent.answer_chunks import BatchResult
from lockstep.agent.failure_detector import FailureDetector
from lockstep.agent.failure_log import FailureLog
from lockstep.agent.local_host import Event, LocalHost
from lockstep.agent.membership import WorkerMembership
from lockstep.agent.observer import RunObserver
from lockstep.agent.recovery import Resumption, resume, step_in_flight
from lockstep.agent.step_log import StepLog, Throughput
from lockstep.agent.time_sampler import TimeSampler
from lockstep.errors import NumericsError, ResourceError, WorkerLostError
from lockstep.planning.assignment import assign
from lockstep.planning.host_role import HostRole
from lockstep.planning.metric_decisions import Told
from lockstep.planning.ownership import ownership_of
from lockstep.planning.plan import Plan
from lockstep.planning.step_phases import Phase, Stage, progress_of
from lockstep.planning.teams import team_count, team_of
from lockstep.planning.worker_messages import (
    AgentMessage,
    BatchDone,
    BatchesDone,
    Interrupted,
    LoaderLost,
    MetricTold,
    Rested,
    RunSteps,
    Scored,
    ShardCorrupted,
    ShardsTraced,
    Started,
    StateCorrupted,
    StepsNative,
    Stop,
    WorkerFailed,
)
from lockstep.state.control_segment import RING
from lockstep.state.host_memory import HostMemory
from lockstep.state.snapshot import steps_between
from lockstep.system.processes import private_bytes
from lockstep.system.unix_channel import Closed

TICK = 0.05
FORK_RETRY_SECONDS = 1.0
"""After how long a fork that failed is tried again."""
"""Seconds between two looks at the ring buffer."""
DISMISS_SECONDS = 10.0


class WorkerGroup:
    """The workers of a host that is set up, from `step` on."""

    def __init__(
        self,
        host: LocalHost,
        memory: HostMemory,
        plan: Plan,
        observer: RunObserver,
        step: int | None,
        *,
        lease: Callable[[], int],
        held: bool = False,
        warm_up: float = 0.0,
    ) -> None:
        """Take over a host.

        Args:
            host: the host's processes.
            memory: the host's memory.
            plan: the job's plan, with this host's number of workers.
            observer: receives the history of the run.
            step: after how many steps the state is; None: it has to come from another host.
            lease: the lease policy: how far the workers may run, asked again and again.
            held: whether the workers rest until the hosts of the job have agreed where to begin.
            warm_up: seconds of steps that do not count to the throughput.
        """
        self.host, self.memory, self.plan, self.observer = host, memory, plan, observer
        self.control = memory.control
        self.throughput = Throughput(warm_up)
        self.step_log = StepLog(memory, plan, observer, self.throughput, step or 0)
        self.failure_log = FailureLog(host, memory, self.step_log, observer)
        self.failure_detector = FailureDetector(host, self.control, self.step_log, self.failure_log)
        self.time_sampler = TimeSampler(
            self.control, host.name, observer, memory_of=self._memory_of
        )
        self.members = WorkerMembership(
            target=plan.workers, max_workers=plan.max_workers, held=held
        )
        self._formed = -1
        """The arrangement of hosts under which workers were grouped, last."""
        ownership = ownership_of(plan.ownership, plan.servers, plan.compression, plan.local_steps)
        self.role = HostRole.alone(host.name, plan, ownership)
        self.has_state = step is not None
        self.corrupted: str | None = None
        """Why the hosts have to be regrouped: such as a state that is corrupted here."""
        self.answers: deque[BatchResult | Scored] = deque()
        """What workers have said of held-out data, for whoever has asked."""
        self.told: list[Told] = []
        """What the task's schedule has been told, where it waits for a metric."""
        self.idle: dict[int, int] = {}
        """By worker that rests at the lease's end, its step."""
        self._retry_at: float | None = None
        self._fork_error: ResourceError | None = None
        """Why a worker could not be forked, the last time that it was tried."""
        self._lease = lease
        self._marked = step or 0
        """The last step at whose end the snapshot is, or will be, brought up to date."""
        self.reset_words(step or 0)
        if step is not None:
            memory.snapshot.take(step, memory.written() if memory.boards is not None else None)
            self.control.mirror_step = step

    @property
    def step(self) -> int:
        """How many steps are committed and recorded."""
        return self.step_log.step

    @property
    def at_rest(self) -> bool:
        """Whether the members in force all rest."""
        return not self.members.regrouping and self.members.all_rest

    # Membership: what happened goes to the pure machine, what it commands is carried out.

    def decide(self, event: membership.Event) -> None:
        """Let the machine decide on an event and carry its commands out."""
        self.members, commands, reason = membership.decide(self.members, event)
        for command in commands:
            match command:
                case membership.SpawnWorker(worker_id):
                    self._spawn(worker_id, reason)
                case membership.RaiseEpoch():
                    self.control.raise_epoch()
                    self.observer.event("regroup", epoch=self.control.epoch, reason=reason)
                case membership.DismissWorker(worker_id):
                    self.tell(worker_id, Stop())
                    self.observer.event("dismissed", worker=worker_id, reason=reason)
                case membership.FormGroup(worker_ids):
                    self._form(worker_ids, reason)
                case membership.GiveUp() if self._fork_error is not None:
                    raise self._fork_error
                case membership.GiveUp():
                    raise WorkerLostError(
                        f"workers cannot be started: {reason}",
                        fix="look for the out-of-memory killer, or for native code that crashes",
                    )

    def _spawn(self, worker_id: int, reason: str) -> None:
        """Fork a worker. Where the system does not allow it, it is tried again after a while."""
        try:
            pid = self.host.spawn(worker_id).pid
        except ResourceError as error:
            self._retry_at = time.monotonic() + FORK_RETRY_SECONDS
            self.observer.event("fork_failed", worker=worker_id, why=error.what)
            self._fork_error = error
            self.decide(membership.ForkFailed(worker_id))
            return
        self.observer.event("spawned", worker=worker_id, pid=pid, reason=reason)

    def _form(self, worker_ids: tuple[int, ...], reason: str) -> None:
        """Put the state in order and let the new members go on. Everybody rests."""
        members = self.step_log.worker_ids or worker_ids
        resumption = resume(
            [self.control.progress(worker_id) for worker_id in members],
            [self.control.updating(worker_id) for worker_id in members],
            self.control.shard_done.tolist(),
            self.control.snapshot_step,
            self._teams(len(worker_ids)),
            self.role.shards,
            self.control.mirror_step if self.plan.apart else None,
        )
        if self.role.together and self._formed == self.role.generation:
            self.decide(membership.RegroupDeferred())  # others' workers have partners here
            self.corrupted = f"its workers have to find their partners anew: {reason}"
            return
        if resumption.back is None:
            self.step_log.mend(resumption.step)
        elif self.role.several:  # to roll back alone is no use: other hosts have gone on
            self.decide(membership.RegroupDeferred())
            self.corrupted = f"its state is corrupted: {reason}"
            return
        else:
            self.roll_back()
        self._formed = self.role.generation
        self._resume(worker_ids, {*members, *worker_ids}, resumption, reason)

    def _resume(
        self,
        worker_ids: tuple[int, ...],
        known: set[int],
        resumption: Resumption,
        reason: str,
    ) -> None:
        """Reset the words of all `known` workers, and send the members their assignments."""
        control, role = self.control, self.role
        with control.membership_lock:
            for worker_id in known:
                control.set_updating(worker_id, -1)
                control.await_exchange(worker_id, 0)
                control.await_member(worker_id, None, "")
            for worker_id in worker_ids:
                control.set_progress(worker_id, progress_of(resumption.step, Phase.STARTED))
                control.forget_shard(worker_id)
            self.step_log.worker_ids = worker_ids
        self.idle.clear()
        self.throughput.rest()
        self.grant()
        self.failure_log.regrouped(resumption)
        self.failure_detector.regrouped()
        self.observer.event("formed", seats=worker_ids, step=resumption.step, reason=reason)
        refresh = resumption.back is None and not role.parted and not self.observer.busy()
        ahead_from = resumption.step
        if self.failure_log.has_died_since_commit:  # what kills is met where it is computed
            ahead_from = max(resumption.step, self.step) + 1
        for rank, worker_id in enumerate(worker_ids):
            index = team_of(rank, self.plan.team)
            assignment = assign(
                role,
                worker_ids,
                rank,
                epoch=control.epoch,
                step=resumption.step,
                todo=resumption.todo[index] if index < len(resumption.todo) else (),
                refresh=refresh,
                loaders=self.failure_log.loaders_live,
                ahead_from=ahead_from,
                told=tuple(self.told),
                team=self.plan.team,
            )
            self.tell(worker_id, assignment)

    def roll_back(self) -> None:
        """Put the snapshot in the place of a state that is corrupted."""
        self.step_log.drain()
        self.memory.snapshot.roll_back(self.role.kept(self.memory.layout))
        control = self.control
        control.snapshot_due[:] = 0  # later steps' marks may lie where those redone will
        control.mirror_step = control.snapshot_step
        if self.plan.apart:  # every death leads back here: it is not to stay as far behind
            self._marked = control.snapshot_step
            self._mark(max(self._marked, control.lease - RING), control.lease, self._pace)

    def _teams(self, workers: int) -> int:
        """Of so many workers, how many compute shards, each by itself or with partners."""
        if self.role.together:
            return self.role.placement.teams
        return team_count(workers, self.plan.team)

    def reset_words(self, step: int) -> None:
        """Let nobody be in the middle of anything: everybody is at the start of a step."""
        self.control.set_exchanged(step, Stage.STARTED)
        for worker_id in range(self.plan.max_workers):
            self.control.set_progress(worker_id, progress_of(step, Phase.STARTED))
            self.control.set_updating(worker_id, -1)
            self.control.await_exchange(worker_id, 0)

    def tell(self, worker_id: int, message: AgentMessage) -> None:
        """Send a message; to one that has just died, in vain: its death will be heard of."""
        with contextlib.suppress(Closed):
            self.host.workers[worker_id].channel.send(message)

    def tell_metric(self, told: Told) -> None:
        """Tell the members the metric that the task's schedule waits for. Called at rest; whoever
        becomes a member later is told with its assignment."""
        if self.told and self.told[-1][0] >= told[0]:
            return
        self.told.append(told)
        for worker_id in self.members.formed:
            self.tell(worker_id, MetricTold(told=told))

    # The lease: workers may run every step below it.

    def grant(self) -> None:
        """Extend the lease as far as it may go, and wake the workers that rest below it.

        Not while everybody is to rest: a lone worker meets nobody at a barrier who could tell it.
        """
        if self.members.regrouping:
            return
        lease = max(self.control.lease, self._lease())
        self._mark(self.control.lease, lease, self._pace)
        self.control.lease = lease
        woken = [worker_id for worker_id, step in self.idle.items() if step < lease]
        for worker_id in woken:
            del self.idle[worker_id]
            self.tell(worker_id, RunSteps())
        if woken:
            self.decide(membership.WorkersResumed())

    @property
    def _pace(self) -> float:
        """Steps per second."""
        return self.throughput.rate / self.plan.batch_size

    def _mark(self, first: int, last: int, steps_per_second: float) -> None:
        """Mark the steps of a new lease at whose end the snapshot is brought up to date: none while
        a checkpoint is being written from it."""
        every = steps_between(self.memory.snapshot.nbytes, self.plan.workers, steps_per_second)
        for step in range(first, last):
            due = step - self._marked >= every and not self.role.parted and not self.observer.busy()
            self.control.snapshot_due[step % RING] = due
            if due:
                self._marked = step

    def _memory_of(self, worker_id: int) -> int:
        worker = self.host.workers.get(worker_id)
        return 0 if worker is None else private_bytes(worker.pid)

    # What the workers say.

    def listen(self) -> None:
        """Hear what the workers say, and who has died, for up to a tick."""
        for event in self.host.events(TICK):
            self._heard(event)
        self.time_sampler.look(self.step_log.worker_ids)
        self.failure_log.looked = time.monotonic()

    def watch(self) -> None:
        """See that everybody who has something to do gets on with it."""
        if self._retry_at is not None and time.monotonic() >= self._retry_at:
            self._retry_at = self._fork_error = None
            self.decide(membership.ForkRetried())
        self.failure_detector.kill_stalled(set(self.members.having(membership.Status.WORKING)))
        self.failure_detector.kill_absent(self.members.status)

    def _heard(self, event: Event) -> None:
        worker, message = event.worker, event.message
        if message is None:
            status = self.members.status.get(worker.worker_id)
            self.failure_log.died(worker, status)
            self.failure_detector.regrouped()  # whoever waited for it starts afresh
            self.idle.pop(worker.worker_id, None)
            self.decide(membership.WorkerDied(worker.worker_id))
            return
        worker_id = worker.worker_id
        match message:
            case Started():
                self._admit(worker_id, message.probe)
                self.decide(membership.WorkerReady(worker_id))
            case Rested():
                self.idle[worker_id] = message.step
                self.decide(membership.WorkerRested(worker_id))
                if self.at_rest:  # before whatever is asked of those who rest: it may be the end
                    self.control.mirror_step = message.step
                    self.time_sampler.flush()
            case Interrupted() | BatchesDone():
                self.decide(membership.WorkerRested(worker_id))
            case BatchDone():
                result = json.loads(message.result)
                self.answers.append(
                    BatchResult(round=message.round, batch=message.batch, result=result)
                )
            case Scored():
                self.answers.append(message)
            case ShardCorrupted():
                self._note_corrupt(message, shard=message.shard)
            case StateCorrupted():
                self._note_corrupt(message, tensor=message.tensor, elements=[*message.elements])
                self.failure_log.corrupted(message)
                self.decide(membership.WorkerCorrupted(worker_id))
            case ShardsTraced():
                self.observer.event(
                    "traced", host=self.host.name, worker=worker_id,
                    forms=message.forms, why_not=message.why_not,
                    native=message.native, why_not_native=message.why_not_native,
                )  # fmt: skip
            case StepsNative():
                self.observer.event(
                    "native", host=self.host.name, worker=worker_id, why_not=message.why_not
                )
            case LoaderLost():
                self.failure_log.lost_loader(worker)
            case WorkerFailed():
                raise self.failure_log.raised(message.error.error(), message.step)

    def _note_corrupt(self, found: ShardCorrupted | StateCorrupted, **what: object) -> None:
        self.observer.event(
            "corrupt", host=self.host.name, worker=found.worker_id, step=found.step, **what
        )

    def _admit(self, worker_id: int, probe: str) -> None:
        expected = self.memory.profile.get("device_probe", self.host.facts["probe"])
        if probe != expected and self.plan.threads == 1:
            raise NumericsError(
                f"worker {worker_id} does not compute the same bits as the forkserver",
                expected=f"probe {expected}",
                found=f"probe {probe}",
                fix="run with --numerics portable",
            )
        pid = self.host.workers[worker_id].pid
        self.observer.event("joined", host=self.host.name, worker=worker_id, pid=pid, probe=probe)

    def take_snapshot(self) -> tuple[int, memoryview]:
        """The snapshot, brought up to date, and after how many steps it is. Called when every
        worker rests. Where no host has the whole state the snapshot stays as it is."""
        if self.role.parted:
            return self.control.snapshot_step, self.memory.snapshot.view
        self.observer.settle()
        return self.step, self.memory.snapshot.take(self.step)

    def in_flight_words(self) -> tuple[int, bool]:
        """The step that the members in force have not committed, and whether somebody has begun to
        update for it."""
        words = [self.control.progress(worker_id) for worker_id in self.step_log.worker_ids]
        step = step_in_flight(words) if words else self.step
        updating = [self.control.updating(worker_id) for worker_id in self.step_log.worker_ids]
        return step, step in updating

    def await_rest(self) -> None:
        """Wait until the members in force all rest at the stop."""
        while not self.at_rest:
            self.listen()
            self.watch()

    # The end.

    def dismiss(self) -> None:
        """Send the workers home and see them go; the host kills whoever is left."""
        for worker_id in self.members.status:
            self.tell(worker_id, Stop())
        limit = time.monotonic() + DISMISS_SECONDS
        while any(worker.alive for worker in self.host.workers.values()):
            left = limit - time.monotonic()
            if left <= 0:
                return
            for _ in self.host.events(left):
                pass
        self.time_sampler.flush()
