"""Teams: runs of consecutive workers that compute a shard together, each some of its slices. Pure.

W workers make W // t teams of t; those that are left over make one more, smaller team. Slices are
what is computed, whoever computes them, so a smaller team computes the same bits, and so does one
of a single worker.
"""

from __future__ import annotations

from collections.abc import Sequence

from lockstep.job.slice_words import MOST_BOARDS
from lockstep.planning.sampling import home_shards


def team_count(workers: int, team: int) -> int:
    """How many teams so many workers make. `team`: the members that a team has."""
    return -(-workers // team)


def team_of(rank: int, team: int) -> int:
    """The index of the team of the worker of this rank."""
    return rank // team


def team_ranks(workers: int, team: int, index: int) -> range:
    """The ranks of a team's members; the first one leads it."""
    return range(index * team, min((index + 1) * team, workers))


def slices_of(slices: int, members: int, position: int) -> range:
    """The slices that a member computes: consecutive, as even as can be, the first ones more."""
    return home_shards(slices, members, position)


def batches_together(batches: int, workers: int, team: int) -> bool:
    """Whether teams compute held-out batches together: where some workers would have none. Else
    each worker computes its own, and exchanges nothing."""
    return team > 1 and batches < workers


def describe_teams(worker_ids: Sequence[int], team: int) -> str:
    """The teams of workers, in words."""
    count = team_count(len(worker_ids), team)
    members = [
        " + ".join(str(worker_ids[rank]) for rank in team_ranks(len(worker_ids), team, index))
        for index in range(count)
    ]
    return f"{count} team{'s' * (count > 1)} of workers: {', '.join(members)}"


def most_partners(slices: int, shards: int) -> int:
    """Where hosts make teams: the most workers of one host. Each has a line for each slice, since
    there may be as many hosts."""
    return min(shards, MOST_BOARDS // slices)


def board_line(position: int, rank: int, max_workers: int) -> int:
    """Where hosts make a team: the line of a board of the worker of this rank on the host of this
    position, as a host numbers lines that may have so many workers itself."""
    return position * max_workers + rank
