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
from functools import partial

import blake3
import numpy as np
import numpy.typing as npt
import torch

from lockstep.collectives.barrier import Barrier, Regroup
from lockstep.errors import IntegrityError
from lockstep.planning.assignment import Assignment
from lockstep.planning.teams import board_line, slices_of
from lockstep.slices.board import SPINS, Board
from lockstep.slices.board_memory import NOTHING_LEFT
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
        shared, hosts = context.shared, assignment.host_team
        members, own, epoch = list(assignment.teammates), assignment.worker_id, assignment.epoch
        if hosts is not None:
            lines = partial(board_line, rank=assignment.rank, max_workers=context.plan.max_workers)
            members = [lines(position) for position in range(hosts.hosts)]
            own, epoch = lines(hosts.position), hosts.generation
        assert context.boards is not None
        self._over_hosts = hosts is not None
        self._control, self._faults = shared.control, context.faults or None
        self._epoch, self._worker_id = assignment.epoch, assignment.worker_id
        self._forward_backward, self._loader = context.forward_backward, context.loader
        self._sampling, self._params = context.sampling, shared.params
        self._step = self._shard = 0
        self.board = Board(
            context.boards,
            members,
            own,
            epoch,
            spins=1 if barrier.crowded else SPINS,
            look=self._look,
            awaits=self._await,
        )
        self.team = Team(
            self.board, context.plan.slices, None if self._faults is None else self._at_exchange
        )
        self._slice_of = slice_numbers(shared.model)
        self._own = self._written_by(self.board.worker_id)
        self._others = frozenset(np.flatnonzero(~self._own).tolist())
        """The parameters whose gradients other members write."""
        self._theirs = {
            member: self._written_by(member) & ~self._own for member in self.board.others
        }
        """By other member, the parameters whose gradients it alone writes."""
        self._flags = np.zeros_like(shared.control.has_grad[0])
        self._slots: dict[int, GradientSlot] = {}

    @property
    def answers(self) -> bool:
        """Whether this member says what comes of a held-out batch."""
        return self.board.leads

    @property
    def records(self) -> bool:
        """Whether this member records what comes of a shard: one of each host."""
        return self.board.leads or self._over_hosts

    def pop_waiting_seconds(self) -> float:
        """For how many seconds other members were waited for in this step's shards."""
        waited, self.board.waited = self.board.waited, 0.0
        return waited

    def shards(self, step: int, todo: Sequence[int], chosen: Iterator[int]) -> Iterator[int]:
        """The shards that this team computes in a step. `chosen`: what the leader chooses, of which
        `todo` are the team's own."""
        self.board.waited = 0.0  # at held-out batches it counts as evaluating
        if not self.board.leads:
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
            if shard not in self._sampling.active(step):
                raise IntegrityError(
                    f"a team's leader announces shard {shard} of step {step}",
                    expected="one that is computed in this step",
                )
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
        if not self.records:
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
        if self.board.leads:
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
        logged = _digest(outcome) if outcome.logged else 0
        if not self._over_hosts:
            self.board.finish(outcome.loss, logged)
            return
        told = self.board.finish(outcome.loss, logged, torch.from_numpy(self._flags))
        for member, flags in told.items():  # what it has of gradients is on its host alone
            theirs = self._theirs[member]
            self._control.has_grad[self._shard, theirs] = _flags_of(flags, theirs)

    # Helpers.

    def _written_by(self, member: int) -> npt.NDArray[np.bool_]:
        """The parameters whose gradients a member writes: those of its slices, and if it records
        what comes of the shard on its host, those that are not cut."""
        team, position = self.team, self.board.members.index(member)
        own = slices_of(team.slices, team.size, position)
        rest = self._over_hosts or position == 0
        return np.array([
            self._slice_of[id(param)] in own if id(param) in self._slice_of else rest
            for param in self._params
        ])  # fmt: skip

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
        if not self._over_hosts:  # else it is none of this host's workers
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
    hosts = assignment.host_team
    if hosts is not None:
        return TeamWork(context, assignment, barrier) if assignment.rank < hosts.teams else None
    if len(assignment.teammates) == 1:
        return None
    return TeamWork(context, assignment, barrier)


def _flags_of(told: torch.Tensor | None, params: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Another host's flags of these parameters.

    Raises:
        IntegrityError: it has told something else.
    """
    if told is None or told.dtype != torch.uint8 or told.shape != params.shape:
        raise IntegrityError(
            "another host of the team does not say which gradients there are",
            expected=f"{params.size} flags",
            found=str(None if told is None else (told.dtype, tuple(told.shape))),
        )
    return told.numpy()[params]


def _digest(outcome: ShardOutcome) -> int:
    """A digest of what is logged."""
    values = np.array(list(outcome.logged.values()), np.float64).tobytes()
    return _word(repr(list(outcome.logged)).encode() + values)


def _word(data: bytes) -> int:
    """A digest that fits a word."""
    return int.from_bytes(blake3.blake3(data).digest(8), "little", signed=True)
