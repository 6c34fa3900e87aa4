"""Purity check: before the first step, a shard is computed twice, after different histories.

One pristine fork computes it at once. The other first computes another shard, and the same samples
as the next data epoch draws them. Counters, caches, lists, own generators and data changed in place
show as a difference. What needs more history than that is left to `purity_watch`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable, Sequence

from lockstep.planning.plan import Plan
from lockstep.system.unix_channel import Closed
from lockstep.worker.context import Session
from lockstep.worker.pristine import (
    Outcome,
    Work,
    differing,
    has_room,
    impure,
    random_results,
    read_outcome,
)

LIMIT_SECONDS = 60.0
"""When the check is given up: a shard takes too long."""
Fork = Callable[[Sequence[Work], int, int, bool], int]
"""`(works, slot, descriptor, explain) -> pid`: start a pristine fork, which leaves its outcome."""


def histories(plan: Plan) -> tuple[list[Work], list[Work]]:
    """Two lists of shards that end with the same one; empty where this host computes none."""
    first = sum(shards for _, shards in plan.sampling.all_parts[: plan.part])
    _, count = plan.sampling.all_parts[plan.part]
    own = [shard for shard in plan.sampling.active(0) if first <= shard < first + count]
    if not own or plan.steps == 0:
        return [], []
    target = Work(step=0, shard=own[0])
    other = Work(step=0, shard=own[-1])
    if len(own) == 1 and plan.steps > 1 and own[0] in plan.sampling.active(1):
        other = Work(step=1, shard=own[0])
    again = plan.steps_per_epoch if plan.steps > plan.steps_per_epoch else 0
    return [target], [other, Work(step=again, shard=own[0], samples_of=(0, own[0])), target]


class PurityCheck:
    """The forks of one check."""

    def __init__(self, session: Session, fork: Fork, agent: int) -> None:
        """`agent`: a descriptor that is hung up when nobody waits for the check any more."""
        self._session, self._fork, self._agent = session, fork, agent
        self._deadline = time.monotonic() + LIMIT_SECONDS

    def run(self) -> None:
        """Compute and compare.

        Raises:
            TaskError: something remembers.
            Closed: the agent has gone.
        """
        alone, after = histories(self._session.plan)
        if alone and has_room(self._session.shared):
            with contextlib.suppress(OSError):  # no process, or no descriptor, can be had
                self._compare(alone, after)

    def _compare(self, alone: Sequence[Work], after: Sequence[Work]) -> None:
        one, other = self._outcomes([alone, after])
        if one is None or other is None or one.error is not None:
            return  # workers will meet the same, and tell of it
        if other.error is not None:
            if self._raises(after[:-1]):
                return
        elif one.parts == other.parts:
            return
        where = f"shard {alone[0].shard} of step 0"
        one, again = self._outcomes([alone, alone], explain=True)
        if one is None or again is None:
            return
        if differing(one.parts, again.parts):
            raise random_results(where, one, again)
        (other,) = self._outcomes([after], explain=True)
        if other is not None:
            raise impure(where, one, other)

    def _raises(self, works: Sequence[Work]) -> bool:
        """Whether one of these shards raises an error that it raises alone, too."""
        outcomes = (self._outcomes([[work]])[0] for work in works)
        return any(outcome is None or outcome.error is not None for outcome in outcomes)

    def _outcomes(
        self, lists: Sequence[Sequence[Work]], *, explain: bool = False
    ) -> list[Outcome | None]:
        """What comes of lists of shards, each computed in a fork: side by side where workers are
        to compute side by side, and each fork has a slot."""
        plan, slots = self._session.plan, len(self._session.shared.slots)
        if min(plan.workers, slots) < len(lists):
            return [self._side_by_side([works], explain)[0] for works in lists]
        return self._side_by_side(lists, explain)

    def _side_by_side(self, lists: Sequence[Sequence[Work]], explain: bool) -> list[Outcome | None]:
        fds = [os.memfd_create("lockstep-outcome", os.MFD_CLOEXEC) for _ in lists]
        pids: list[int] = []
        try:
            for slot, (works, fd) in enumerate(zip(lists, fds, strict=True)):
                pids.append(self._fork(works, slot, fd, explain))
            while pids:
                self._await_end(pids[0])
                os.waitpid(pids[0], 0)
                del pids[0]
            return [read_outcome(fd) for fd in fds]
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            for fd in fds:
                os.close(fd)

    def _await_end(self, pid: int) -> None:
        """Wait for a fork's end; it is killed when the time is over.

        Raises:
            Closed: the agent has gone.
        """
        pidfd, poll = os.pidfd_open(pid), select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(self._agent, 0)
        try:
            left = max(0.0, self._deadline - time.monotonic())
            ready = {fd for fd, _ in poll.poll(left * 1000)}
            if self._agent in ready:
                raise Closed
            if not ready:
                os.kill(pid, signal.SIGKILL)
        finally:
            os.close(pidfd)
