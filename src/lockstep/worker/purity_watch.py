"""Purity watch: while a job runs, a worker has one of its shards computed again, now and then.

It is computed by a pristine fork from the same committed state, before the step is committed, and
compared. So what remembers is found also where that takes many steps. When it is done depends on
the time alone, and changes no number.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from lockstep.planning.forkserver_messages import ComputeShard, ToPristine
from lockstep.planning.metric_decisions import Told
from lockstep.state.shard_outcomes import recorded_outcome
from lockstep.state.shared_state import SharedState
from lockstep.system.processes import ends_within
from lockstep.system.seeding import derive
from lockstep.system.unix_channel import Closed
from lockstep.worker.context import Session
from lockstep.worker.pristine import (
    Outcome,
    digest_held,
    digest_parts,
    has_room,
    impure,
    random_results,
    read_outcome,
)

LEAST_SECONDS = 0.1
"""What a check is taken to cost before there has been one."""
PATIENCE, PATIENCE_SECONDS = 5.0, 2.0
"""How long a fork may take: so many times what the worker took for the shard, and so much more."""

LOOK_SECONDS = 0.1
EARLY_STEPS = range(1, 9)
"""In one of these there is a check in any case: parameters have changed, so that what was made of
the initial ones, when it was first needed, shows."""
MOST_SUSPICIONS = 3
"""How often steps are checked for what the one before has frozen: some do it all the time."""


class PurityWatch:
    """One worker's checks."""

    def __init__(self, session: Session, worker_id: int, channel: ToPristine) -> None:
        """`channel`: to the forkserver."""
        self._session, self._channel, self._worker_id = session, channel, worker_id
        self._fraction, self._seed = session.plan.purity, session.plan.seed
        self.told: tuple[Told, ...] = ()
        """What the task's schedule has been told, where it waits for a metric."""
        self._checks = self._suspicions = 0
        self._froze_at = -1
        self._cost = LEAST_SECONDS
        self._due = time.perf_counter() + self._interval(session.plan.workers)

    def is_due(self, step: int, now: float, froze_at: int) -> bool:
        """Whether it is time for a check: also after a step that froze or thawed parameters, which
        `froze_at` is the last of, since the next one may rely on that."""
        froze = froze_at != self._froze_at and step > froze_at
        early = step in EARLY_STEPS and self._worker_id == 0 and not self._checks
        return now >= self._due or early or (froze and self._suspicions < MOST_SUSPICIONS)

    def _interval(self, workers: float) -> float:
        """Seconds to the next check: so many that all workers' keep to the fraction, and random."""
        if self._fraction >= 1.0:
            return 0.0
        drawn = derive(self._seed, "purity", self._worker_id, self._checks) / 2**63
        return (0.5 + drawn) * workers * self._cost * (1 / self._fraction - 1)

    def check(self, step: int, shards: Sequence[int], took: float, froze_at: int) -> None:
        """Have one of the shards that this worker has computed in a step computed again.

        `took`: how many seconds all of them took. Called before any worker goes on.

        Raises:
            TaskError: the result is another.
        """
        if not shards:  # others were quicker: it stays due
            return
        self._suspicions += froze_at != self._froze_at
        self._froze_at = froze_at
        begun = time.perf_counter()
        chosen = derive(self._seed, "purity shard", step, self._worker_id) % len(shards)
        shared = self._session.shared
        if has_room(shared):
            self._compare(step, shards[chosen], PATIENCE * took + PATIENCE_SECONDS)
        now = time.perf_counter()
        self._checks += 1
        self._cost = max(now - begun, took)
        of_all = len(self._session.plan.sampling.active(step)) / len(shards)
        self._due = now + self._interval(of_all)

    def _compare(self, step: int, shard: int, seconds: float) -> None:
        session, shared = self._session, self._session.shared
        own = _of_slot(shared, step, shard)
        fork = self._computed(step, shard, seconds, explain=False)
        if fork is None or (fork.error is None and fork.parts == own):
            return
        here = Outcome(parts=own, held=digest_held(session.task, session.train, shared))
        one = self._computed(step, shard, seconds, explain=True)
        two = self._computed(step, shard, seconds, explain=True)
        if one is None or two is None or one.error is not None:
            return
        where = f"shard {shard} of step {step}"
        if one.parts != two.parts:
            raise random_results(where, one, two)
        if one.parts != own:
            raise impure(where, one, here)

    def _computed(self, step: int, shard: int, seconds: float, *, explain: bool) -> Outcome | None:
        """What a pristine fork makes of a shard; None if it does not in time."""
        fd = pidfd = -1
        try:
            fd = os.memfd_create("lockstep-outcome", os.MFD_CLOEXEC)
            request = ComputeShard(step=step, shard=shard, explain=explain, told=self.told)
            self._channel.send(request, [fd])
            _, (pidfd,) = self._channel.receive(seconds)
            return read_outcome(fd) if self._ends(pidfd, shard, seconds) else None
        except (Closed, OSError):  # it took too long, or no process can be had
            return None
        finally:
            for each in (fd, pidfd):
                if each >= 0:
                    os.close(each)

    def _ends(self, pidfd: int, shard: int, seconds: float) -> bool:
        """Whether a process ends in time. Waiting for it is no stall."""
        deadline = time.monotonic() + seconds
        while not ends_within(pidfd, LOOK_SECONDS):
            self._session.shared.control.beat(self._worker_id, shard)
            if time.monotonic() > deadline:
                return False
        return True


def _of_slot(shared: SharedState, step: int, shard: int) -> dict[str, bytes]:
    control = shared.control
    flags: Any = control.has_grad[shard]
    return digest_parts(shared, shared.slots[shard], flags, recorded_outcome(control, step, shard))
