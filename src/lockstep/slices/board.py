"""Board: shared memory in which the members of a team show each other parts of results.

Each member has a line of words, and two buffers that it writes to by turns. A *turn* is a shard
that a team computes; in it, members meet at numbered exchanges. Two buffers are enough: who writes
to one for exchange n + 2 has seen everybody at n + 1, where all have read what was shown at n. They
go on by turns over the end of a shard, since nobody waits there until the others have read.

A word counts only with the stamp that lies before it: the membership's epoch, the turn, and the
attempt at it. So what an earlier membership has left is never taken for a new word, whoever died
where. Every wait looks at the words again and again: a lost wake-up costs a moment.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from lockstep.errors import IntegrityError
from lockstep.slices.board_memory import (
    COUNT,
    EPOCH_MASK,
    EPOCH_SHIFT,
    LINE,
    LINE_WORDS,
    SHARD,
    SHOWN,
    SIGN_OFFSET,
    STAMP,
    TURN_SHIFT,
    BoardMemory,
)
from lockstep.slices.shown_tensors import Shown, TensorBuffer, read_tensors, write_tensors
from lockstep.system import futex
from lockstep.system.spin_budget import SpinBudget

FINISHED = 0
"""The kind of the last exchange of a turn, of the loss."""
NAP = 0.02
"""Seconds: the longest single sleep before the words and the epoch are looked at again."""
SPINS = 3000
"""Looks at the words before sleeping, where every worker has a core: about a millisecond."""


class PassRestarted(Exception):
    """Another member begins this shard again: so must everybody."""


class Board:
    """One member's end of its team's board, in one membership."""

    def __init__(
        self,
        memory: BoardMemory,
        members: Sequence[int],
        worker_id: int,
        epoch: int,
        *,
        spins: int,
        look: Callable[[], None],
        awaits: Callable[[int | None], None],
    ) -> None:
        """Take a place in a team.

        Args:
            memory: the host's.
            members: the team's worker ids; the first one leads it.
            worker_id: this worker's. Where hosts make a team these are numbers of lines.
            epoch: of the membership.
            spins: how often words are looked at, at the most, before this process sleeps.
            look: called while something is waited for: raises if the membership has changed.
            awaits: told before each sleep which member is waited for, and None when it has come.
        """
        self.members, self.worker_id = tuple(members), worker_id
        self.others = [each for each in members if each != worker_id]
        self.count = 0
        """How many exchanges there were in this turn."""
        self.waited = 0.0
        """For how many seconds others were waited for."""
        self._before = 0
        """How many there were in all turns before: buffers go on by turns from one to the next."""
        self._cut_short: Exception | None = None
        """What has ended this pass: nothing more is shown in it."""
        self._budget = SpinBudget(spins)
        self._look, self._awaits = look, awaits
        words = memoryview(memory.words.map).cast("q")
        self._words = words
        self._signs = memoryview(memory.words.map).cast("i")
        base = np.frombuffer(memory.words.map, np.uint8).ctypes.data
        self._sign_addresses = {each: base + each * LINE + SIGN_OFFSET for each in members}
        self._sign_index = {each: (each * LINE + SIGN_OFFSET) // 4 for each in members}
        self._buffers = {each: [TensorBuffer(fd) for fd in memory.fds[each]] for each in members}
        self._turn, self._attempt, self._epoch = 0, 0, epoch & EPOCH_MASK
        self._own = worker_id * LINE_WORDS
        self._publish_stamp()

    @property
    def leads(self) -> bool:
        """Whether this member says which shard comes next."""
        return self.worker_id == self.members[0]

    # Turns.

    def announce(self, shard: int) -> None:
        """Begin a turn. Called by the leader, when everybody has finished the turn before."""
        self._words[self._own + SHARD] = shard
        self._next_turn()

    def follow(self) -> int:
        """Wait until the leader begins a turn; returns its shard, or `NOTHING_LEFT`."""
        leader, wanted = self.members[0], self._turn + 1

        def announced() -> bool:
            stamp = self._words[leader * LINE_WORDS + STAMP]
            return stamp >> EPOCH_SHIFT == self._epoch and self._turn_of(stamp) >= wanted

        self._wait(leader, announced)
        shard = self._words[leader * LINE_WORDS + SHARD]
        self._next_turn()
        return shard

    def again(self) -> None:
        """Begin this turn once more, and wait until everybody does: nobody reads any more what was
        shown before."""
        self._attempt += 1
        self.count, self._cut_short = 0, None
        self._publish_stamp()
        self._meet()

    # Exchanges.

    def show(self, kind: int, tensors: Sequence[torch.Tensor | None]) -> None:
        """Show the others parts of this exchange's result, and wait until they show theirs.

        Raises:
            PassRestarted: a member begins this shard again.
        """
        if self._cut_short is not None:  # user code has caught what ended the pass
            raise self._cut_short
        self.count += 1
        number = self._words[self._own + SHOWN] + 1
        origin = (number, self._stamp, self.count)
        write_tensors(self._buffer(self.worker_id), kind, tensors, origin)
        self._words[self._own + SHOWN] = number
        self._publish_count()
        try:
            self._meet()
        except Exception as error:
            self._cut_short = error
            raise

    def shown(self, member: int, kind: int) -> list[torch.Tensor | None]:
        """What another member shows in this exchange. To be read before the next exchange.

        Raises:
            IntegrityError: it is at another kind of exchange.
        """
        found = read_tensors(self._buffer(member))
        self._check_kind(member, found, kind)
        return found.tensors

    def finish(
        self, loss: float, logged: int, told: torch.Tensor | None = None
    ) -> dict[int, torch.Tensor | None]:
        """Say that this member's part of the shard is done, and wait until everybody's is; returns
        what others have told, by member.

        All compute the loss, and what is logged beside it, whose digest is given: they are compared
        bit for bit.

        Raises:
            PassRestarted: a member begins this shard again.
            IntegrityError: a member has got another loss, or exchanges something still.
        """
        own = [torch.tensor([loss], dtype=torch.float64), torch.tensor([logged])]
        self.show(FINISHED, [*own, told])
        found = {}
        for other in self.others:
            value, beside, found[other] = self.shown(other, FINISHED)
            assert value is not None and beside is not None
            theirs = float(value)
            if struct.pack("d", theirs) != struct.pack("d", loss) or beside.item() != logged:
                what = "other results" if theirs == loss else "another loss"
                raise _differing(
                    self.worker_id, other, what,
                    f"a loss of {loss.hex()} of worker {self.worker_id}, {theirs.hex()} of {other}",
                )  # fmt: skip
        return found

    def _buffer(self, member: int) -> TensorBuffer:
        """Where a member shows its parts of the exchange that is under way."""
        return self._buffers[member][(self._before + self.count) % 2]

    def _check_kind(self, member: int, found: Shown, kind: int) -> None:
        if found.kind != kind:
            raise _differing(
                self.worker_id, member, "other exchanges",
                f"exchange {self.count} is of kind {kind} in worker {self.worker_id}, of kind "
                f"{found.kind} in {member}",
            )  # fmt: skip

    # Words.

    def _turn_of(self, stamp: int) -> int:
        return (stamp >> TURN_SHIFT) & ((1 << (EPOCH_SHIFT - TURN_SHIFT)) - 1)

    def _next_turn(self) -> None:
        self._before += self.count
        self._turn, self._attempt, self.count = self._turn + 1, 0, 0
        self._publish_stamp()

    def _publish_stamp(self) -> None:
        """The count first: with the new stamp, the old one must not be seen."""
        self._stamp = self._epoch << EPOCH_SHIFT | self._turn << TURN_SHIFT | self._attempt
        self._words[self._own + COUNT] = 0
        self._words[self._own + STAMP] = self._stamp
        self._ring()

    def _publish_count(self) -> None:
        self._words[self._own + COUNT] = self.count
        self._ring()

    def _ring(self) -> None:
        index = self._sign_index[self.worker_id]
        self._signs[index] = (self._signs[index] + 1) & 0x7FFFFFFF
        futex.wake(self._sign_addresses[self.worker_id])

    def _meet(self) -> None:
        """Wait until everybody has come to this exchange."""
        for other in self.others:
            if not self._is_here(other):
                self._wait(other, lambda: self._is_here(other))  # noqa: B023  # called at once

    def _is_here(self, other: int) -> bool:
        line = other * LINE_WORDS
        stamp = self._words[line + STAMP]
        if stamp == self._stamp:
            return self._words[line + COUNT] >= self.count
        if stamp >> EPOCH_SHIFT != self._epoch or stamp < self._stamp:
            return False
        if stamp >> TURN_SHIFT == self._stamp >> TURN_SHIFT:
            raise PassRestarted
        return True  # in a later turn: it has finished this one

    def _wait(self, other: int, is_there: Callable[[], bool]) -> None:
        spins, slept, begun = self._budget.spins, False, time.perf_counter()
        index, address = self._sign_index[other], self._sign_addresses[other]
        while True:
            seen = self._signs[index]  # before the words: a change since then ends the sleep
            if is_there():
                break
            self._look()
            if spins:
                spins -= 1
                continue
            slept = True
            self._awaits(other)
            futex.wait(address, seen, NAP)
        taken = time.perf_counter() - begun
        self._budget.learn(taken)
        self.waited += taken
        if slept:
            self._awaits(None)


def _differing(one: int, other: int, what: str, found: str) -> IntegrityError:
    return IntegrityError(
        f"workers {one} and {other} of one team have computed {what}",
        expected="the same bits of what all members of a team compute",
        found=found,
        fix="run with team 1: if the results differ from run to run there, the task draws on "
        "something that is not seeded; else this machine is faulty",
    )
