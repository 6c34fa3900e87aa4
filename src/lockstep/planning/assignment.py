"""Assignment: what one worker does in each step, as long as the membership stays as it is.

The agent makes one for each member and sends it; it starts the worker at a step. What follows from
it and from the model's shapes, the worker's own share of the blocks, norms and sums, is a
pure function of both: every worker could say what every other one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.planning.blocks import Block, divide_evenly, own_blocks
from lockstep.planning.byte_ranges import ByteRange, cut_evenly
from lockstep.planning.host_role import HostRole
from lockstep.planning.metric_decisions import Told
from lockstep.planning.ownership import Returns, owned_apart
from lockstep.planning.sampling import home_shards
from lockstep.planning.teams import team_count, team_of, team_ranks
from lockstep.system.messages import Message

Run = tuple[int, int]
"""The first, and the one after the last."""


class HostTeam(Message):
    """Hosts of which each has some of the slices: workers of one rank compute shards together."""

    hosts: int
    position: int
    """This host's place among them."""
    teams: int
    """How many workers of each host have a partner on all others."""
    generation: int
    """The number of this arrangement of hosts."""


class Assignment(Message, tag="join"):
    """One worker's part in a membership, and where it starts."""

    epoch: int
    worker_ids: tuple[int, ...]
    """All members, by rank."""
    rank: int
    step: int
    """The first step that it runs."""
    todo: tuple[int, ...]
    """Its shards of that step that nobody has computed yet."""
    shard_run: Run
    """The shards that this host computes."""
    subtree_runs: tuple[Run, ...]
    """What is summed by itself before all is: all hosts' subtrees, or groups."""
    several_hosts: bool
    returns: Returns
    """What hosts give each other when each has summed its share, or updated it."""
    host_sums: tuple[ByteRange, ...]
    """What of a slot this host sums for all, where hosts return sums."""
    remote_params: frozenset[int]
    """The trainable parameters that other hosts alone update."""
    owned_params: frozenset[int]
    """The trainable parameters that some host alone updates."""
    refresh: bool
    """Whether the snapshot is brought up to date first."""
    loaders: bool
    """Whether loader processes are worth another try."""
    ahead_from: int
    """The first step in which it may fetch a later step's batch: a sample that kills whoever
    fetches it is found by its own step and shard."""

    told: tuple[Told, ...] = ()
    """What the task's schedule has been told, where it waits for a metric."""

    team: int = 1
    """How many of this host's workers compute a shard together; the last team may have fewer."""
    host_team: HostTeam | None = None
    """The hosts that compute each shard together; None: each computes some of the shards."""

    @property
    def worker_id(self) -> int:
        return self.worker_ids[self.rank]

    @property
    def workers(self) -> int:
        """How many workers this host has."""
        return len(self.worker_ids)

    @property
    def owned_apart(self) -> bool:
        """Whether each host updates parameters of its own."""
        return owned_apart(self.returns)

    @property
    def host_shards(self) -> range:
        """The shards that this host computes."""
        return range(*self.shard_run)

    @property
    def subtrees(self) -> tuple[range, ...]:
        """What is summed by itself before all is: all hosts' subtrees, or groups."""
        return tuple(range(*run) for run in self.subtree_runs)

    @property
    def teams(self) -> int:
        """How many teams this host's workers make; without teams, each worker is one."""
        if self.host_team is not None:
            return self.host_team.teams
        return team_count(self.workers, self.team)

    @property
    def teammates(self) -> tuple[int, ...]:
        """The members of this worker's team, itself among them; the first one leads it."""
        index = team_of(self.rank, self.team)
        return tuple(self.worker_ids[rank] for rank in team_ranks(self.workers, self.team, index))

    @property
    def shards(self) -> tuple[int, ...]:
        """The shards that are this worker's, or its team's, to begin with, in every step."""
        shards, index = self.host_shards, team_of(self.rank, self.team)
        if index >= self.teams:  # it has no partner on another host
            return ()
        return tuple(shards[i] for i in home_shards(len(shards), self.teams, index))


def assign(
    role: HostRole,
    worker_ids: tuple[int, ...],
    rank: int,
    *,
    epoch: int,
    step: int,
    todo: tuple[int, ...],
    refresh: bool,
    loaders: bool,
    ahead_from: int,
    told: tuple[Told, ...] = (),
    team: int = 1,
) -> Assignment:
    """The assignment of the worker of this rank, on a host of this role."""
    return Assignment(
        epoch=epoch,
        worker_ids=worker_ids,
        rank=rank,
        step=step,
        todo=todo,
        shard_run=(role.shards.start, role.shards.stop),
        subtree_runs=tuple((tree.start, tree.stop) for tree in role.subtrees),
        several_hosts=role.several,
        returns=role.duties.returns,
        host_sums=role.sums,
        remote_params=frozenset(role.remote_params),
        owned_params=role.owned_params,
        refresh=refresh,
        loaders=loaders,
        ahead_from=ahead_from,
        told=told,
        team=team,
        host_team=_host_team(role),
    )


def _host_team(role: HostRole) -> HostTeam | None:
    if not role.together:
        return None
    return HostTeam(
        hosts=len(role.placement.parts),
        position=role.position,
        teams=role.placement.teams,
        generation=role.generation,
    )


@dataclass(frozen=True, kw_only=True)
class WorkerShare:
    """What of its host's blocks, norms and sums is one worker's."""

    blocks: Sequence[int]
    """The blocks that it updates."""
    norms: Sequence[int]
    """The trainable parameters whose gradient norms it takes, where there is a limit."""
    sums: tuple[ByteRange, ...]
    """What of a slot it sums for all hosts, where they return sums."""


def share_of(
    assignment: Assignment,
    blocks: Sequence[Block],
    param_sizes: Sequence[int],
    *,
    undivided: bool = False,
) -> WorkerShare:
    """The share of the worker with this assignment.

    `blocks` are the model's, `param_sizes` the elements of its trainable parameters. `undivided`:
    the first worker updates all of them.
    """
    rank, workers, remote = assignment.rank, assignment.workers, assignment.remote_params
    local = [number for number, block in enumerate(blocks) if block.param not in remote]
    owners = 1 if undivided else workers
    runs = own_blocks([blocks[number] for number in local], owners)
    run = runs[rank] if rank < owners else range(0)
    sizes = [0 if param in remote else size for param, size in enumerate(param_sizes)]
    return WorkerShare(
        blocks=local[run.start : run.stop],
        norms=[param for param in divide_evenly(sizes, workers)[rank] if param not in remote],
        sums=tuple(cut_evenly(run, workers)[rank] for run in assignment.host_sums),
    )
