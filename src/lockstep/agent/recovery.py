"""Recovery: from what lies in the control segment when everybody rests, to where to go on. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.planning.sampling import home_shards
from lockstep.planning.step_phases import PHASES_PER_STEP, Phase

POISON_DEATHS = 3
"""Workers that one shard of one step may take with it before the run stops."""


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """Where a new membership goes on."""

    step: int
    """The first step to be run, again or for the first time."""
    back: int | None
    """None: the state is that before `step`. Else some blocks have been updated and others not: the
    state is put back to the snapshot, which is so many committed steps older."""
    todo: tuple[tuple[int, ...], ...]
    """Per rank, or per team: the shards that are still to be computed."""


def step_in_flight(words: Sequence[int]) -> int:
    """The first step that is not committed, from the progress words of all members, dead or alive.

    A step is committed when every word has reached `UPDATED`: only then can anybody pass the
    barrier, and whoever looks at the words later passes it as well.
    """
    return (min(words) + PHASES_PER_STEP - Phase.UPDATED) // PHASES_PER_STEP


def resume(
    words: Sequence[int],
    updating: Sequence[int],
    shard_done: Sequence[int],
    snapshot_step: int,
    workers: int,
    mine: range | None = None,
    mirror_step: int | None = None,
) -> Resumption:
    """Decide where `workers` workers, or teams, go on.

    Args:
        words: the progress words of the membership that was in force.
        updating: for each of its members, the last step whose update it has begun.
        shard_done: per shard, the last step that it was computed for.
        snapshot_step: after how many steps the snapshot was taken. It is whole once anybody has
            begun to update: everybody had come to the step's first barrier, and copied its part
            before.
        workers: how many there will be.
        mine: the shards that are theirs to compute; None: all.
        mirror_step: where workers have homes of their own, after how many steps the host's state
            was last that of all of them. Of any other step it lacks what a dead worker had, and
            so do the slots: then all goes back to the snapshot, and every shard is computed anew.
            None: workers have no other state than the host's.
    """
    shards = range(len(shard_done)) if mine is None else mine
    step = step_in_flight(words)
    corrupted = step in updating or mirror_step not in (None, step)
    back = step - snapshot_step if corrupted else None
    if back or mirror_step is not None:
        step = snapshot_step if back else step
        open_shards = list(shards)
    else:
        open_shards = [shard for shard in shards if shard_done[shard] != step]
    count = len(open_shards)
    if mirror_step is not None:  # as in every step: what is summed together follows from it
        runs = [home_shards(count, workers, rank) for rank in range(workers)]
    else:
        edges = [count * rank // workers for rank in range(workers + 1)]
        runs = [range(*run) for run in itertools.pairwise(edges)]
    todo = tuple(tuple(open_shards[run.start : run.stop]) for run in runs)
    return Resumption(step=step, back=back, todo=todo)
