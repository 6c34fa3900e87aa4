"""Job measurement: forks that compute a job's shards and steps for a moment, for the planner.

So many forks work side by side as the planner asks for, as the workers of one host without an
agent. The first one keeps the time, and says on a *board* in memory of theirs what all do next:

    COMPUTE   shards of one size, again and again: the others are load
    STEPS     whole steps (`TrainStep`), with all their meetings, before one
    UPDATE    their blocks, again and again
    END       nothing more

What they write to the shared state is thrown away with it: they are forks of a clone of the
forkserver. Times are medians, since what disturbs a machine only ever adds to them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lockstep.collectives.barrier import Barrier
from lockstep.collectives.gradient_presence import GradientPresence
from lockstep.data.loader import Loader
from lockstep.device.shared import SharedDevice
from lockstep.optim.block_owner import BlockOwner
from lockstep.planning.assignment import Assignment, assign, share_of
from lockstep.planning.host_role import HostRole
from lockstep.planning.job_profile import Measurement, ShardTime
from lockstep.planning.ownership import ownership_of
from lockstep.planning.plan import Plan
from lockstep.planning.step_phases import Phase, progress_of
from lockstep.planning.worker_messages import ShardsTraced, WorkerMessage
from lockstep.state.control_segment import ControlSegment, Stat
from lockstep.system import numerics
from lockstep.worker.context import Session, WorkerContext
from lockstep.worker.train_step import TrainStep

COMPUTE, STEPS, UPDATE, END = 1, 2, 3, 4
KINDS, NUMBER_BITS = 8, 40
STEPS_SECONDS, CHUNK_SECONDS = 0.25, 0.02
"""For how long whole steps are run, and how many of them before the board is looked at again."""
LEAST_STEPS = 4
"""Fewer say little: of long steps the parts are measured alone."""
WARM_SHARDS, WARM_SECONDS = 40, 0.1
"""After how many shards, of a worker, and seconds a job is warm: what is traced is traced then."""
SIZE_SECONDS, UPDATE_SECONDS = 0.06, 0.03
"""For how long shards of a size, or updates, are repeated."""
COPY_BYTES = 1 << 24
GUESSED_REST = 1e-4
"""What a step takes beside, where whole steps are too long to be run: little beside them."""
SPINS, WAIT_SECONDS = 5000, 2e-5
"""How often the board is looked at before each look is a nap."""


class Board:
    """What the first fork tells the others; made before they are forked.

    It is one word, so that nobody reads half of what is told: the turn, what to do, its number.
    """

    def __init__(self) -> None:
        self._word = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.int64)
        self._turn = 0

    def tell(self, doing: int, number: int) -> None:
        """What to do now: shards of so many samples, the steps before this number, updates from so
        many slots."""
        self._turn += 1
        self._word[0] = (self._turn * KINDS + doing) << NUMBER_BITS | number

    def told(self) -> tuple[int, int, int]:
        """The turn, what to do in it, and its number."""
        head, number = divmod(int(self._word[0]), 1 << NUMBER_BITS)
        return *divmod(head, KINDS), number


class SizedBatches(Loader):
    """Batches of so many samples, whatever the shard."""

    size = 1

    def get(self, step: int, shard: int) -> Any:
        first = shard * self.size
        samples = [(first + i) % self.sampling.samples for i in range(self.size)]
        return self.fetch(0, samples)


class MeasuringFork:
    """One of the forks."""

    def __init__(self, session: Session, rank: int, workers: int) -> None:
        self.plan = dataclasses.replace(session.plan, workers=workers, faults=())
        self.shared, self.rank, self.workers = session.shared, rank, workers
        numerics.configure(self.plan.threads)
        session = dataclasses.replace(session, plan=self.plan)
        self._forms = 0
        self._context = context = WorkerContext.of(session, rank, self._report, SharedDevice())
        self._sized = SizedBatches(
            session.fetch, self.plan.sampling, loaders=0, spare_cores=0, last=0
        )
        assignment = _assignment(self.plan, self.shared.control, rank, workers)
        self.shards = assignment.shards
        sizes = [parameter.numel() for parameter in self.shared.params]
        undivided = self.shared.undivided is not None
        share = share_of(assignment, self.shared.blocks, sizes, undivided=undivided)
        barrier = Barrier(
            self.shared.control, rank, assignment.worker_ids, assignment.epoch, self.plan.threads
        )
        self._owner = BlockOwner(
            self.shared, share.blocks, context.faults, scheduled=context.schedule.changed
        )
        self._train_step = TrainStep(context, assignment, share, barrier, self._owner, None)
        context.schedule.go_to(0)
        context.loader.assign(self.shards, 0)

    def _report(self, message: WorkerMessage) -> None:
        if isinstance(message, ShardsTraced):
            self._forms = message.forms

    @property
    def traced(self) -> bool:
        """Whether shards are traced by now."""
        return self._forms > 0

    @property
    def owns(self) -> bool:
        """Whether there are blocks that it updates."""
        return bool(self._owner.groups)

    def step(self, number: int) -> None:
        """One step, together with the others."""
        self._train_step.run(number, self.shards)

    def compute(self, samples: int) -> float:
        """Compute a shard of so many samples the plain way; the seconds that it took."""
        self._sized.size = samples
        passes = self._context.forward_backward
        with passes.plainly(self._sized):
            begun = time.perf_counter()
            passes.make(0, self.rank, self.shared.slots[self.rank], self._flags)
            return time.perf_counter() - begun

    @property
    def _flags(self) -> Any:
        return self.shared.control.has_grad[self.rank]

    def update(self, slots: int) -> float:
        """Update its blocks from so many slots; the seconds that it took."""
        presence = GradientPresence.of_step(self.shared.control, range(slots))
        scale = None if self.plan.sum_limit is None else torch.ones(())
        begun = time.perf_counter()
        if scale is not None:
            self._owner.reduce(presence)
        self._owner.update(0, presence, scale)
        return time.perf_counter() - begun

    def follow(self, board: Board) -> None:
        """Do what the first fork says."""
        done, step, idle = 0, 0, 0
        while True:
            turn, doing, number = board.told()
            if doing == COMPUTE:
                self.compute(number)
            elif doing == UPDATE:
                self.update(number)
            elif turn == done or not doing:
                idle += 1
                if idle > SPINS:
                    time.sleep(WAIT_SECONDS)
                continue
            elif doing == STEPS:
                while step < number:
                    self.step(step)
                    step += 1
            else:
                return
            done, idle = turn, 0

    def close(self) -> None:
        """End what it has started."""
        self._context.loader.close()


class Timekeeper:
    """The first fork: measures, and leads the others."""

    def __init__(self, fork: MeasuringFork, board: Board, sizes: Sequence[int], budget: float):
        """`sizes`: of shards, the job's own first. `budget`: seconds, after which no other size is
        begun."""
        self._fork, self._board, self._sizes = fork, board, sizes
        self._plan, self._control = fork.plan, fork.shared.control
        self._until = time.perf_counter() + budget

    def measure(self) -> Measurement:
        """Everything, the most important first."""
        fork, (own, *others) = self._fork, self._sizes
        times = {own: self._shard(own)}
        reset_peak()
        each = -(-self._plan.shards // fork.workers)
        steps = self._steps(times[own] * each)
        sums, optimizer = self._update()
        for size in others:
            if time.perf_counter() < self._until:
                times[size] = self._shard(size)
        self._board.tell(END, 0)
        seconds, step, count = steps or (times[own], 0.0, 0)
        parts = seconds * each + optimizer + sums * (self._plan.shards - 1)
        return Measurement(
            workers=fork.workers,
            shards=tuple(ShardTime(samples=size, seconds=times[size]) for size in sorted(times)),
            own=ShardTime(samples=own, seconds=seconds),
            traced=fork.traced,
            sum_seconds=sums,
            optimizer_seconds=optimizer,
            rest_seconds=step - parts if count else GUESSED_REST,
            steps=count,
            copy_rate=self._copy_rate(),
            worker_bytes=private_bytes(),
        )

    def _shard(self, samples: int) -> float:
        """The median of repeated passes, without the first one, unless that is long enough."""
        self._board.tell(COMPUTE, samples)
        first = self._fork.compute(samples)
        if first >= SIZE_SECONDS:
            return first
        return _median(lambda: self._fork.compute(samples), SIZE_SECONDS)

    def _steps(self, guessed: float) -> tuple[float, float, int] | None:
        """The seconds of a shard in whole steps, those of such a step, and how many were timed;
        None: they are too long, or too few."""
        warm = max(2, -(-WARM_SHARDS // len(self._fork.shards)))
        many = max(1, int(CHUNK_SECONDS / guessed))
        if guessed * (LEAST_STEPS + 2) > STEPS_SECONDS or self._plan.steps < 2 * (warm + many):
            return None
        step, begun = 0, time.perf_counter()
        while step + many < self._plan.steps // 2 and (
            step < warm or time.perf_counter() - begun < WARM_SECONDS
        ):
            step = self._run(step, many)
        taken: list[float] = []
        before, first, begun = self._computing(), step, time.perf_counter()
        while step + many <= self._plan.steps and (
            step - first < LEAST_STEPS or time.perf_counter() - begun < STEPS_SECONDS
        ):
            at = time.perf_counter()
            step = self._run(step, many)
            taken.append((time.perf_counter() - at) / many)
        count = step - first
        shard = (self._computing() - before) / (count * self._plan.shards)
        return shard, statistics.median(taken), count

    def _run(self, step: int, many: int) -> int:
        """So many steps from this one on; the next."""
        self._board.tell(STEPS, step + many)
        for number in range(step, step + many):
            self._fork.step(number)
        return step + many

    def _computing(self) -> float:
        """What all workers together have spent on computing, and on fetching for it."""
        rows = self._control.seconds[: self._fork.workers]
        return float(rows[:, Stat.COMPUTE].sum() + rows[:, Stat.DATA].sum())

    def _update(self) -> tuple[float, float]:
        """Seconds to add one more slot to the sum of this worker's blocks, and to update these
        from one slot."""
        self._control.has_grad[:] = self._control.has_grad[0]
        shards = self._plan.shards
        if not self._fork.owns:
            return 0.0, 0.0
        one = self._updates(1)
        return (max(self._updates(shards) - one, 0.0) / (shards - 1) if shards > 1 else 0.0), one

    def _updates(self, slots: int) -> float:
        self._board.tell(UPDATE, slots)
        self._fork.update(slots)
        return _median(lambda: self._fork.update(slots), UPDATE_SECONDS)

    def _copy_rate(self) -> float:
        """Bytes per second from the state to the snapshot."""
        segments = self._fork.shared.segments
        source = memoryview(segments["state"].map)[:COPY_BYTES]
        target = memoryview(segments["snapshot"].map)[:COPY_BYTES]
        seconds = 1e-9
        for _ in range(2):  # the first one faults pages in
            begun = time.perf_counter()
            target[: len(source)] = source
            seconds = max(time.perf_counter() - begun, 1e-9)
        return len(source) / seconds


def _median(call: Callable[[], float], seconds: float) -> float:
    """The median of what a call returns in so many seconds; one call at least."""
    taken: list[float] = []
    limit = time.perf_counter() + seconds
    while not taken or time.perf_counter() < limit:
        taken.append(call())
    return statistics.median(taken)


def measure(
    session: Session, rank: int, workers: int, sizes: Sequence[int], budget: float, board: Board
) -> Measurement | None:
    """Be one of the forks; what the first one has measured."""
    fork, found = MeasuringFork(session, rank, workers), None
    if rank:
        fork.follow(board)
    else:
        found = Timekeeper(fork, board, sizes, budget).measure()
    fork.close()
    return found


def reset_words(control: ControlSegment, workers: int) -> None:
    """Let nobody be in the middle of anything, before forks begin with step 0."""
    control.shard_done[:] = -1
    control.seconds[:] = 0.0
    for worker_id in range(workers):
        control.set_progress(worker_id, progress_of(0, Phase.STARTED))
        control.set_updating(worker_id, -1)
        control.forget_shard(worker_id)


def _assignment(plan: Plan, control: ControlSegment, rank: int, workers: int) -> Assignment:
    """That of one of so many workers of a lone host."""
    ownership = ownership_of(plan.ownership, plan.servers, plan.compression, plan.local_steps)
    assignment = assign(
        HostRole.alone("", plan, ownership), tuple(range(workers)), rank,
        epoch=control.epoch, step=0, todo=(), refresh=False, loaders=True, ahead_from=0,
    )  # fmt: skip
    return assignment


def reset_peak() -> None:
    """Let the peak of memory be counted from now on: what a fork has inherited and let go of was
    not its own."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def private_bytes() -> int:
    """The most memory of its own that this process has had since `reset_peak`: what it has now, and
    what it has given back. Segments of the run are counted elsewhere, whoever maps them."""
    status = _kilobytes(Path("/proc/self/status"))
    given_back = max(0, status.get("VmHWM", 0) - status.get("VmRSS", 0))
    return 1024 * (private_kilobytes(Path("/proc/self/smaps")) + given_back)


def private_kilobytes(smaps: Path) -> int:
    """What is written and not shared with another process, by a file such as /proc/self/smaps;
    without memory files, which are private as long as nobody else has touched them."""
    total, counts = 0, True
    try:
        lines = smaps.read_text(errors="replace").splitlines()
    except OSError:
        return 0
    for line in lines:
        name, _, value = line.partition(":")
        if "-" in name and value and " " in name:  # the head of a mapping
            counts = "/memfd:" not in line
        elif name == "Private_Dirty" and counts:
            total += int(value.split()[0])
    return total


def _kilobytes(path: Path) -> dict[str, int]:
    """The fields of such a file that are sizes."""
    found = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = int(value.split()[0])
    return found
