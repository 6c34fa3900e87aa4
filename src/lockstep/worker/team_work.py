"""Team work: a member's part in the shards that its team computes together.

The team's leader chooses the shards, as a worker without a team does, and announces each. Every
member fetches the shard's batch, computes what is outside of slices and its own slices, and writes
its slices' gradients; the leader writes what all have, and counts the shard as done when all are.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import blake3
import numpy as np

from lockstep.collectives.barrier import Barrier, Regroup
from lockstep.planning.assignment import Assignment
from lockstep.slices.board import NOTHING_LEFT, SPINS, Board
from lockstep.slices.slicing import slice_numbers
from lockstep.slices.team import Team, computing_with
from lockstep.state.gradient_slots import GradientSlot
from lockstep.state.shard_outcomes import ShardOutcome
from lockstep.worker.context import WorkerContext

FORWARD_EXCHANGE, BACKWARD_EXCHANGE = 1, 0
"""Before which exchange of a pass a scripted fault strikes: forwards, between two."""


class TeamWork:
    """One member's, in one membership."""

    def __init__(self, context: WorkerContext, assignment: Assignment, barrier: Barrier) -> None:
        shared, members = context.shared, assignment.teammates
        assert context.boards is not None
        self._control, self._faults = shared.control, context.faults or None
        self._epoch, self._worker_id = assignment.epoch, assignment.worker_id
        self._forward_backward, self._loader = context.forward_backward, context.loader
        self._sampling = context.sampling
        self._step = self._shard = 0
        self.board = Board(
            context.boards,
            members,
            assignment.worker_id,
            assignment.epoch,
            spins=1 if barrier.crowded else SPINS,
            look=self._look,
            awaits=self._await,
        )
        self.team = Team(
            self.board, context.plan.slices, None if self._faults is None else self._at_exchange
        )
        numbers, own = slice_numbers(shared.model), self.team.own(context.plan.slices)
        self._own = np.array([
            numbers[id(param)] in own if id(param) in numbers else self.board.leads
            for param in shared.params
        ])  # fmt: skip
        self._others = frozenset(np.flatnonzero(~self._own).tolist())
        """The parameters whose gradients other members write."""
        self._flags = np.zeros_like(shared.control.has_grad[0])
        self._slots: dict[int, GradientSlot] = {}

    @property
    def leads(self) -> bool:
        """Whether this member records what comes of a shard."""
        return self.board.leads

    def pop_waiting_seconds(self) -> float:
        """For how many seconds other members were waited for in this step's shards."""
        waited, self.board.waited = self.board.waited, 0.0
        return waited

    def shards(self, step: int, todo: Sequence[int], chosen: Iterator[int]) -> Iterator[int]:
        """The shards that this team computes in a step. `chosen`: what the leader chooses, of which
        `todo` are the team's own."""
        self.board.waited = 0.0  # at held-out batches it counts as evaluating
        if not self.leads:
            yield from self._announced(step, todo)
            return
        active = self._sampling.active(step)
        for shard in chosen:
            if shard in active:
                self.board.announce(shard)
            yield shard
        self.board.announce(NOTHING_LEFT)

    def _announced(self, step: int, todo: Sequence[int]) -> Iterator[int]:
        self._step, self._shard = step, -1
        left = deque(todo)
        while (shard := self.board.follow()) != NOTHING_LEFT:
            while shard in left and left[0] != shard:
                self._loader.skip(step, left.popleft())  # another team was quicker
            if shard in left:
                left.popleft()
            yield shard
        for each in left:
            self._loader.skip(step, each)

    def make(self, step: int, shard: int, slot: GradientSlot) -> ShardOutcome:
        """Forward and backward of one shard, into its slot, together with the others. When it
        returns, all gradients are there.

        Raises:
            Regroup: the membership has changed.
            IntegrityError: members have got different losses.
        """
        self._step, self._shard = step, shard
        if not self.leads:
            slot = self._without_buffers(shard, slot)
        with computing_with(self.team), self._forward_backward.in_team(self, self._others):
            return self._forward_backward.make(step, shard, slot, self._flags)

    # Held-out batches, which all members of the team are given in the same order.

    def computing_batches(self) -> contextlib.AbstractContextManager[None]:
        """Compute held-out batches together with the others."""
        return computing_with(self.team)

    def begin_batch(self, step: int, batch: int) -> None:
        """Begin a held-out batch, when the leader does.

        Raises:
            Regroup: the membership has changed.
        """
        self._step, self._shard = step, batch
        if self.leads:
            self.board.announce(batch)
        else:
            self.board.follow()
        self.team.begin("forward")

    def finish_batch(self, result: str) -> None:
        """Wait until all members have made this of the batch.

        Raises:
            IntegrityError: a member has got something else.
        """
        self.board.finish(0.0, _word(result.encode()))

    # Called from within the pass.

    def begin(self, phase: str) -> None:
        """A phase of the shard begins: `forward` or `backward`."""
        self.team.begin(phase)

    def again(self) -> None:
        """The shard is computed once more, by all members."""
        self.board.again()

    def finish(self, outcome: ShardOutcome) -> None:
        """Say which gradients this member has written, and wait for the others.

        Raises:
            PassRestarted: another member computes the shard again.
        """
        self._control.has_grad[self._shard, self._own] = self._flags[self._own]
        if self._faults is not None:
            self._faults.at("team_slot", self._step, self._shard)
        self.board.finish(outcome.loss, _digest(outcome) if outcome.logged else 0)

    # Helpers.

    def _without_buffers(self, shard: int, slot: GradientSlot) -> GradientSlot:
        """A slot whose buffers are this process's own: all members leave the same in them."""
        if shard not in self._slots:
            private = [buffer.clone() for buffer in slot.buffers]
            self._slots[shard] = replace(slot, buffers=private)
        return self._slots[shard]

    def _look(self) -> None:
        if self._control.epoch != self._epoch:
            raise Regroup

    def _await(self, member: int | None) -> None:
        """Tell the agent who is waited for. Who waits for another is not the one that stalls."""
        self._control.await_member(self._worker_id, member, self.team.phase)
        self._control.beat(self._worker_id, self._shard)

    def _at_exchange(self, phase: str, number: int) -> None:
        """Let a scripted fault strike between two exchanges."""
        assert self._faults is not None
        if number >= (FORWARD_EXCHANGE if phase == "forward" else BACKWARD_EXCHANGE):
            self._faults.at(f"team_{phase}", self._step, self._shard)


def team_work_of(
    context: WorkerContext, assignment: Assignment, barrier: Barrier
) -> TeamWork | None:
    """A worker's part in its team; None: it computes alone."""
    if len(assignment.teammates) == 1:
        return None
    return TeamWork(context, assignment, barrier)


def _digest(outcome: ShardOutcome) -> int:
    """A digest of what is logged."""
    values = np.array(list(outcome.logged.values()), np.float64).tobytes()
    return _word(repr(list(outcome.logged)).encode() + values)


def _word(data: bytes) -> int:
    """A digest that fits a word."""
    return int.from_bytes(blake3.blake3(data).digest(8), "little", signed=True)
