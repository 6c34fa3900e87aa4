"""A host in one process: simulated workers that take one small step at a time, and may die between
any two writes.

The control segment, the undo log, `membership` and `recovery` are the real ones; the workers'
program is `step.Stepper`'s and `owner.Owner`'s, with numbers in place of tensors: a block holds
how many steps have updated it, a slot which step it was computed for and from what.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lockstep import membership
from lockstep.control import Control, ControlShape, Phase, progress_of
from lockstep.layout import Block, own_blocks
from lockstep.membership import Members, Status
from lockstep.memory import Segment
from lockstep.recovery import last_meeting, progress_word, resume
from lockstep.sampling import home_shards
from lockstep.undo import Range, UndoLog, UndoWriter, group_blocks, needed_capacity

BLOCK_BYTES = 16
"""A block is two words, which an update writes one after the other: between, it is torn."""
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
    inbox: deque[dict[str, Any]] = field(default_factory=deque)
    said: deque[str] = field(default_factory=deque)
    """What the master has not heard yet: hello, idle, regroup, and at last died."""
    alive: bool = True


class Simulation:
    """A job of `steps` steps with `shards` shards and `blocks` blocks.

    `blocks` are sizes in elements, in units of an update group's size: two blocks of 0.6 are two
    groups, two of 0.4 one.
    """

    def __init__(
        self, *, shards: int, blocks: list[float], workers: int, seats: int, steps: int, clip: bool
    ) -> None:
        self.shards, self.steps, self.clip = shards, steps, clip
        sizes = [max(1, int(size * (1 << 19))) for size in blocks]
        self.blocks = [Block(param=n, start=0, stop=s, whole=True) for n, s in enumerate(sizes)]
        count = len(blocks)
        capacity = needed_capacity(self.blocks, [[BLOCK_BYTES]] * count)
        shape = ControlShape(shards=shards, seats=seats, blocks=count, params=count)
        self.segments = [
            Segment.create("control", shape.nbytes()),
            Segment.create("undo", seats * capacity.total),
            Segment.create("state", count * BLOCK_BYTES),
        ]
        self.control = Control(self.segments[0], shape)
        self.undo = UndoLog(self.segments[1], capacity)
        self.state = np.frombuffer(self.segments[2].map, np.int64, count=2 * count).reshape(-1, 2)
        self.flat = torch.frombuffer(self.segments[2].map, dtype=torch.uint8)
        self.control.shard_done[:] = self.control.block_done[:] = -1
        self.buffers = [0, 0]
        """The committed buffers, of two words as well; rank 0 writes them from the slots."""
        self.slots: list[Any] = [None] * shards
        self.reduced: list[Any] = [None] * count
        self.claims: dict[int, int] = {}
        self.members = Members(target=workers, seats=seats)
        self.processes: dict[int, Process] = {}
        self.seats: tuple[int, ...] = ()
        self.idle: dict[int, int] = {}
        self.recorded = 0
        """Steps in the ledger."""
        self.computed: dict[int, int] = {}
        """By step: shards whose computation was begun."""
        self.deaths = 0
        self.decide(membership.Begin())

    def close(self) -> None:
        """Let go of the shared memory."""
        del self.flat, self.state
        for process in self.processes.values():
            process.life.close()
        self.processes.clear()
        self.control.close()
        for segment in self.segments[1:]:
            segment.close()

    # Workers.

    def write(self) -> Life:
        """A point between two writes."""
        yield True

    def live(self, seat: int) -> Life:
        """As `worker.Worker.serve`."""
        undo = UndoWriter(self.undo, seat, self.flat, self.control.block_done)
        process = self.processes[seat]
        process.said.append("hello")
        step = 0
        while True:
            while not process.inbox:
                yield False
            message = process.inbox.popleft()
            if message["op"] == "stop":
                return
            if message["op"] == "join":
                worker = _Worker(self, seat, message["seats"], message["epoch"], undo)
                step = message["step"]
                todo, updating = message["todo"], message["updating"]
            else:
                todo, updating = None, False
            try:
                while step < self.control.lease:
                    yield from worker.run(step, todo, updating)
                    step, todo, updating = step + 1, None, False
                process.said.append(f"idle {step}")
            except Regroup:
                process.said.append("regroup")

    def move(self, seat: int) -> bool:
        """Let a worker go on by one write; whether it could."""
        process = self.processes[seat]
        if not process.alive:
            return False
        try:
            return next(process.life)
        except StopIteration:
            self._end(process, seat)
            return True

    def kill(self, seat: int) -> None:
        """End a worker where it is."""
        process = self.processes[seat]
        if process.alive:
            self.deaths += 1
            process.life.close()
            self._end(process, seat)

    def _end(self, process: Process, seat: int) -> None:
        process.alive = False
        process.said.append("died")
        self.claims = {shard: owner for shard, owner in self.claims.items() if owner != seat}

    # The master, as `coordinator` and `history`.

    def hear(self, seat: int) -> bool:
        """Let the master hear the next that a worker has said; whether there was something."""
        if not self.processes[seat].said:
            return False
        what, *number = self.processes[seat].said.popleft().split()
        match what:
            case "hello":
                self.decide(membership.Hello(seat))
            case "idle":
                self.idle[seat] = int(number[0])
                self.decide(membership.Rested(seat))
            case "regroup":
                self.decide(membership.Rested(seat))
            case "died":
                self.undo.restore(seat, self.segments[2], self.control.block_done)
                self.idle.pop(seat, None)
                del self.processes[seat]
                self.decide(membership.Died(seat))
        return True

    def tick(self) -> None:
        """Record what is committed and extend the lease."""
        if self.seats:
            self._record_to(min(self.control.progress(seat) for seat in self.seats))
        self._grant()

    def decide(self, event: membership.Event) -> None:
        self.members, commands, _ = membership.decide(self.members, event)
        for command in commands:
            match command:
                case membership.Spawn(seat):
                    self.processes[seat] = Process(life=self.live(seat))
                case membership.Regroup():
                    self.control.raise_epoch()
                case membership.Dismiss(seat):
                    self.processes[seat].inbox.append({"op": "stop"})
                case membership.Form(seats):
                    self._form(seats)
                case membership.GiveUp():
                    raise AssertionError("too many failed starts for this simulation")

    def _form(self, seats: tuple[int, ...]) -> None:
        control = self.control
        words = [control.progress(seat) for seat in self.seats or seats]
        ready = last_meeting(audited=False, clipped=self.clip)
        found = resume(words, control.shard_done.tolist(), len(seats), ready)
        self._record_to(min(words))
        if not found.updating and self.recorded < found.step:
            self._record_to(progress_of(found.step - 1, Phase.STARTED))
            self.check_committed(found.step)  # `mend` digests the state now
            self._record_to(progress_of(found.step, Phase.STARTED))
        for seat in seats:
            control.set_progress(seat, progress_word(found))
        self.seats = seats
        self.idle.clear()
        self._grant()
        for rank, seat in enumerate(seats):
            self.processes[seat].inbox.append(
                {"op": "join", "epoch": control.epoch, "seats": seats, "step": found.step,
                 "todo": found.todo[rank], "updating": found.updating}
            )  # fmt: skip

    def _grant(self) -> None:
        if self.members.regrouping:
            return
        self.control.lease = max(self.control.lease, min(self.recorded + AHEAD, self.steps))
        woken = [seat for seat, step in self.idle.items() if step < self.control.lease]
        for seat in woken:
            del self.idle[seat]
            self.processes[seat].inbox.append({"op": "run"})
        if woken:
            self.decide(membership.Resumed())

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
        assert self.state.tolist() == [[step, step]] * len(self.blocks)
        assert self.buffers == [step, step]

    def having(self, *wanted: Status) -> tuple[int, ...]:
        return self.members.having(*wanted)


class _Worker:
    """A worker in one membership, as `step.Stepper` with `owner.Owner`."""

    def __init__(
        self, world: Simulation, seat: int, seats: tuple[int, ...], epoch: int, undo: UndoWriter
    ) -> None:
        self.world, self.control, self.seat, self.epoch = world, world.control, seat, epoch
        self.rank, self.workers = seats.index(seat), len(seats)
        self.others = [other for other in seats if other != seat]
        self.home = home_shards(world.shards, self.workers, self.rank)
        self.own = own_blocks(world.blocks, self.workers)[self.rank]
        self.groups = group_blocks(world.blocks, list(self.own))
        self.ranges = [
            [Range(offset=number * BLOCK_BYTES, nbytes=BLOCK_BYTES) for number in group]
            for group in self.groups
        ]
        self.undo = undo

    def wait(self, step: int, phase: Phase) -> Life:
        """As `Barrier.wait`."""
        for other in self.others:
            while self.control.progress(other) < progress_of(step, phase):
                if self.control.epoch != self.epoch:
                    raise Regroup
                yield False
            yield True

    def meet(self, step: int, phase: Phase) -> Life:
        self.control.set_progress(self.seat, progress_of(step, phase))
        yield True
        yield from self.wait(step, phase)

    def run(self, step: int, todo: list[int] | None, updating: bool) -> Life:
        """As `Stepper.run`."""
        world, control = self.world, self.control
        yield from self.compute(step, self.home if todo is None else todo)
        if not updating:
            control.set_progress(self.seat, progress_of(step, Phase.COMPUTED))
            yield True
        yield from self.wait(step, Phase.COMPUTED)
        if world.clip and not updating:
            for number in self.own:
                world.reduced[number] = ("torn", step)
                yield True
                world.reduced[number] = (step, self.sum(step))
                yield True
            yield from self.meet(step, Phase.REDUCED)
            yield from self.meet(step, Phase.NORMED)
        yield from self.update(step)
        if self.rank == 0:
            for word in (0, 1):
                assert self.sum(step) == step
                world.buffers[word] = step + 1
                yield True
        yield from self.meet(step, Phase.UPDATED)
        world.check_committed(step + 1)
        control.set_progress(self.seat, progress_of(step + 1, Phase.STARTED))
        yield True

    def compute(self, step: int, todo: Any) -> Life:
        """As `Stepper._compute_all`."""
        world, done = self.world, self.control.shard_done
        stealing = world.shards != self.workers
        for shard in (*todo, *reversed(range(world.shards))) if stealing else todo:
            if stealing:
                if done[shard] == step or shard in world.claims:
                    continue
                world.claims[shard] = self.seat
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
        """As `Owner.update`."""
        world, done = self.world, self.control.block_done
        for group, ranges in zip(self.groups, self.ranges, strict=True):
            open_blocks = [number for number in group if done[number] < step]
            yield True
            self.undo.save(ranges, group[0], group[-1], step)
            yield True
            for number in open_blocks:
                if world.clip:
                    assert world.reduced[number] == (step, step)
                else:
                    self.sum(step)
                assert world.state[number].tolist() == [step, step], "updated twice, or torn"
                for word in (0, 1):
                    world.state[number, word] = step + 1
                    yield True
            for number in group:
                done[number] = step
                yield True
            self.undo.clear()
            yield True
