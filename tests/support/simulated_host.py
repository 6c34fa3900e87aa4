"""A host in one process: simulated workers that take one small step at a time, and may die between
any two writes.

The control segment, `membership` and `recovery` are the real ones; the workers' program is
`worker.train_step`'s and `state.snapshot`'s, with numbers in place of tensors: a block holds how
many steps have updated it, a slot which step it was computed for and from what.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lockstep.agent import membership
from lockstep.agent.membership import Status, WorkerMembership
from lockstep.agent.recovery import resume
from lockstep.planning.assignment import Assignment, share_of
from lockstep.planning.blocks import Block
from lockstep.planning.step_phases import Phase, progress_of
from lockstep.planning.worker_messages import AgentMessage, RunSteps, Stop
from lockstep.state.control_segment import RING, ControlSegment, ControlShape
from lockstep.system.shared_memory import Segment

AHEAD = 3
"""Steps that the lease runs ahead."""

Life = Generator[bool, None, None]
"""A worker's life: yields after every write whether it could do something."""


class Regroup(Exception):
    """As in `barrier`."""


@dataclass
class Process:
    """A simulated worker."""

    life: Life
    inbox: deque[AgentMessage] = field(default_factory=deque)
    said: deque[str] = field(default_factory=deque)
    """What the master has not heard yet: hello, idle, regroup, and at last died."""
    alive: bool = True


class Simulation:
    """A job of `steps` steps with `shards` shards and blocks of the given sizes (elements).

    The snapshot is brought up to date after every `every` steps.
    """

    def __init__(
        self, *, shards: int, blocks: list[int], workers: int, max_workers: int, steps: int,
        clip: bool, every: int,
    ) -> None:  # fmt: skip
        self.shards, self.steps, self.clip, self.every = shards, steps, clip, every
        self.blocks = [Block(param=n, start=0, stop=s, whole=True) for n, s in enumerate(blocks)]
        count = len(blocks)
        shape = ControlShape(shards=shards, max_workers=max_workers, params=count)
        self.control = ControlSegment(Segment.create("control", shape.nbytes()), shape)
        self.state = np.zeros((count + 1, 2), np.int64)
        """A block is two words, which an update writes one after the other: between, it is torn.
        The last are the committed buffers, which rank 0 writes from the slots."""
        self.snapshot = self.state.copy()
        self.control.snapshot_step = 0
        self.written: Any = None
        """The snapshot at the beginning of the checkpoint that is being written from it."""
        self.control.shard_done[:] = -1
        for worker_id in range(max_workers):
            self.control.set_updating(worker_id, -1)
        self.slots: list[Any] = [None] * shards
        self.reduced: list[Any] = [None] * count
        self.claims: dict[int, int] = {}
        self.members = WorkerMembership(target=workers, max_workers=max_workers)
        self.processes: dict[int, Process] = {}
        self.worker_ids: tuple[int, ...] = ()
        self.idle: dict[int, int] = {}
        self.recorded = 0
        """Steps in the ledger."""
        self.computed: dict[int, int] = {}
        """By step: shards whose computation was begun."""
        self.deaths = self.times_back = 0
        self.stopping = False
        """Whether the lease is not extended any more, so that everybody comes to rest."""
        self.decide(membership.GroupStarted())

    def close(self) -> None:
        """Let go of the shared memory."""
        for process in self.processes.values():
            process.life.close()
        self.processes.clear()
        self.control.close()

    # Workers.

    def write(self) -> Life:
        """A point between two writes."""
        yield True

    def live(self, worker_id: int) -> Life:
        """As `worker.Worker.serve`."""
        process = self.processes[worker_id]
        process.said.append("hello")
        step = 0
        while True:
            while not process.inbox:
                yield False
            message = process.inbox.popleft()
            todo = None
            match message:
                case Stop():
                    return
                case Assignment():
                    worker = _Worker(self, message)
                    step, todo = message.step, message.todo
                    if message.refresh:
                        yield from worker.refresh_snapshot(step)
            try:
                while step < self.control.lease:
                    yield from worker.run(step, todo)
                    step, todo = step + 1, None
                process.said.append(f"idle {step}")
            except Regroup:
                process.said.append("regroup")

    def move(self, worker_id: int) -> bool:
        """Let a worker go on by one write; whether it could."""
        process = self.processes[worker_id]
        if not process.alive:
            return False
        try:
            return next(process.life)
        except StopIteration:
            self._end(process, worker_id)
            return True

    def kill(self, worker_id: int) -> None:
        """End a worker where it is."""
        process = self.processes[worker_id]
        if process.alive:
            self.deaths += 1
            process.life.close()
            self._end(process, worker_id)

    def _end(self, process: Process, worker_id: int) -> None:
        process.alive = False
        process.said.append("died")
        self.claims = {shard: owner for shard, owner in self.claims.items() if owner != worker_id}

    # The master, as `coordinator` and `history`.

    def hear(self, worker_id: int) -> bool:
        """Let the master hear the next that a worker has said; whether there was something."""
        if not self.processes[worker_id].said:
            return False
        what, *number = self.processes[worker_id].said.popleft().split()
        match what:
            case "hello":
                self.decide(membership.WorkerReady(worker_id))
            case "idle":
                self.idle[worker_id] = int(number[0])
                self.decide(membership.WorkerRested(worker_id))
            case "regroup":
                self.decide(membership.WorkerRested(worker_id))
            case "died":
                self.idle.pop(worker_id, None)
                del self.processes[worker_id]
                self.decide(membership.WorkerDied(worker_id))
        return True

    def tick(self) -> None:
        """Record what is committed and extend the lease."""
        if self.worker_ids:
            self._record_to(min(self.control.progress(worker_id) for worker_id in self.worker_ids))
        self._grant()

    def decide(self, event: membership.Event) -> None:
        self.members, commands, _ = membership.decide(self.members, event)
        for command in commands:
            match command:
                case membership.SpawnWorker(worker_id):
                    self.processes[worker_id] = Process(life=self.live(worker_id))
                case membership.RaiseEpoch():
                    self.control.raise_epoch()
                case membership.DismissWorker(worker_id):
                    self.processes[worker_id].inbox.append(Stop())
                case membership.FormGroup(worker_ids):
                    self._form(worker_ids)
                case membership.GiveUp():
                    raise AssertionError("too many failed starts for this simulation")

    def _form(self, worker_ids: tuple[int, ...]) -> None:
        control = self.control
        members = self.worker_ids or worker_ids
        words = [control.progress(worker_id) for worker_id in members]
        found = resume(
            words,
            [control.updating(worker_id) for worker_id in members],
            control.shard_done.tolist(),
            control.snapshot_step,
            len(worker_ids),
        )
        self._record_to(min(words))
        if found.back is not None:
            self.times_back += 1
            self.state[:] = self.snapshot
            self.control.snapshot_due[:] = 0
        elif self.recorded < found.step:
            self._record_to(progress_of(found.step - 1, Phase.STARTED))
            self._record_to(progress_of(found.step, Phase.STARTED))
        self.check_committed(found.step)
        for worker_id in {*members, *worker_ids}:
            control.set_updating(worker_id, -1)
        for worker_id in worker_ids:
            control.set_progress(worker_id, progress_of(found.step, Phase.STARTED))
        self.worker_ids = worker_ids
        self.idle.clear()
        self._grant()
        for rank, worker_id in enumerate(worker_ids):
            self.processes[worker_id].inbox.append(
                Assignment(
                    epoch=control.epoch, worker_ids=worker_ids, rank=rank, step=found.step,
                    todo=found.todo[rank], shard_run=(0, self.shards), subtree_runs=(),
                    several_hosts=False, returns="nothing", host_sums=(),
                    remote_params=frozenset(), owned_params=frozenset(),
                    refresh=found.back is None and self.written is None, loaders=False,
                    ahead_from=found.step,
                )
            )  # fmt: skip

    def _grant(self) -> None:
        if self.members.regrouping:
            return
        lease = max(self.control.lease, min(self.recorded + AHEAD, self.steps))
        if self.stopping:
            lease = self.control.lease
        for step in range(self.control.lease, lease):
            due = (step + 1) % self.every == 0 and self.written is None
            self.control.snapshot_due[step % RING] = due
        self.control.lease = lease
        woken = [worker_id for worker_id, step in self.idle.items() if step < self.control.lease]
        for worker_id in woken:
            del self.idle[worker_id]
            self.processes[worker_id].inbox.append(RunSteps())
        if woken:
            self.decide(membership.WorkersResumed())

    def checkpoint(self) -> None:
        """As `Coordinator.snapshot`, if everybody rests at the lease's end; else ask for rest."""
        self.stopping = True
        resting = self.members.all_rest and bool(self.idle) and not self.members.regrouping
        if resting and self.recorded == self.control.lease and self.written is None:
            self.stopping = False
            self.check_committed(self.recorded)
            self.snapshot[:] = self.state
            self.control.snapshot_step = self.recorded
            self.written = self.snapshot.copy()

    def end_checkpoint(self) -> None:
        self.stopping = False
        if self.written is not None:
            assert self.snapshot.tolist() == self.written.tolist(), "written to while being read"
            self.written = None

    def _record_to(self, reached: int) -> None:
        while (
            self.recorded < self.steps and progress_of(self.recorded + 1, Phase.STARTED) <= reached
        ):
            self.recorded += 1

    @property
    def finished(self) -> bool:
        return self.recorded == self.steps and bool(self.idle) and self.members.all_rest

    def check_committed(self, step: int) -> None:
        """The state is that after `step` steps, whole: every block updated exactly once by each."""
        assert self.state.tolist() == [[step, step]] * len(self.state)

    def having(self, *wanted: Status) -> tuple[int, ...]:
        return self.members.having(*wanted)


class _Worker:
    """A worker in one membership, as `step.Stepper` with `owner.Owner`."""

    def __init__(self, world: Simulation, assignment: Assignment) -> None:
        self.world, self.control = world, world.control
        self.worker_id, self.epoch = assignment.worker_id, assignment.epoch
        self.rank, self.workers = assignment.rank, assignment.workers
        self.others = [other for other in assignment.worker_ids if other != self.worker_id]
        self.home = assignment.shards
        sizes = [block.size for block in world.blocks]
        self.own = share_of(assignment, world.blocks, sizes).blocks
        self.parts = [*self.own, len(world.blocks)] if self.rank == 0 else [*self.own]

    def wait(self, step: int, phase: Phase) -> Life:
        """As `Barrier.wait`."""
        for other in self.others:
            while self.control.progress(other) < progress_of(step, phase):
                if self.control.epoch != self.epoch:
                    raise Regroup
                yield False
            yield True

    def meet(self, step: int, phase: Phase) -> Life:
        self.control.set_progress(self.worker_id, progress_of(step, phase))
        yield True
        yield from self.wait(step, phase)

    def run(self, step: int, todo: Sequence[int] | None) -> Life:
        """As `Stepper.run`."""
        world, control = self.world, self.control
        yield from self.compute(step, self.home if todo is None else todo)
        yield from self.meet(step, Phase.COMPUTED)
        if world.clip:
            for number in self.own:
                world.reduced[number] = ("torn", step)
                yield True
                world.reduced[number] = (step, self.sum(step))
                yield True
            yield from self.meet(step, Phase.REDUCED)
            yield from self.meet(step, Phase.NORMED)
        control.set_updating(self.worker_id, step)
        yield True
        yield from self.update(step)
        yield from self.meet(step, Phase.UPDATED)
        world.check_committed(step + 1)
        if control.snapshot_due[step % RING]:
            yield from self.refresh_snapshot(step + 1)
        control.set_progress(self.worker_id, progress_of(step + 1, Phase.STARTED))
        yield True

    def compute(self, step: int, todo: Any) -> Life:
        """As `Stepper._compute_all`."""
        world, done = self.world, self.control.shard_done
        stealing = world.shards != self.workers
        for shard in (*todo, *reversed(range(world.shards))) if stealing else todo:
            if stealing:
                if done[shard] == step or shard in world.claims:
                    continue
                world.claims[shard] = self.worker_id
                yield True
            world.check_committed(step)
            world.computed[step] = world.computed.get(step, 0) + 1
            world.slots[shard] = ("torn", step)
            yield True
            world.check_committed(step)
            world.slots[shard] = (step, shard)
            yield True
            done[shard] = step
            yield True
            world.claims.pop(shard, None)

    def sum(self, step: int) -> int:
        """Use all slots: each must hold this step's gradient of its shard."""
        assert self.world.slots == [(step, shard) for shard in range(self.world.shards)]
        return step

    def update(self, step: int) -> Life:
        """As `Owner.update`, and `Stepper._combine_buffers`."""
        world = self.world
        for number in self.parts:
            if world.clip and number in self.own:
                assert world.reduced[number] == (step, step)
            else:
                self.sum(step)
            assert world.state[number].tolist() == [step, step], "updated twice, or torn"
            for word in (0, 1):
                world.state[number, word] = step + 1
                yield True

    def refresh_snapshot(self, committed: int) -> Life:
        """As `Stepper.refresh_snapshot`."""
        world = self.world
        assert world.written is None, "a checkpoint is being written from the snapshot"
        for number in self.parts:
            for word in (0, 1):
                assert world.state[number, word] == committed
                world.snapshot[number, word] = committed
                yield True
        if self.rank == 0:
            self.control.snapshot_step = committed
            yield True
