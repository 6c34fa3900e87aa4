"""Step prediction: how long a step takes, and how much memory, if a job is run in some way. Pure.

The slowest host is waited for. A step of it: its workers compute their shards, sum these along the
host's subtrees (reduce), hosts exchange the sums, and all workers sum what there is and update.
Sums that are sent while others are still computed are not counted off: the exchange is an upper
bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lockstep.planning.candidates import Candidate, Host
from lockstep.planning.ownership import DIRECT
from lockstep.planning.reduction_tree import most_subtrees
from lockstep.planning.shard_placement import ShardPlacement
from lockstep.planning.teams import team_count

COMPRESSED = {"none": 1.0, "bf16": 0.5, "int8": 0.2578, "topk": 0.08}
"""How many bytes of a gradient hosts exchange, of one in full."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What of a job its steps' time depends on, beside its profile."""

    shards: int
    samples: float
    """Of a shard."""
    groups: int = 0
    """With compression: into how many groups the shards are divided."""
    compression: str = "none"
    team: int = 1
    """How many workers compute a shard together: predicted as if they divided all of it."""


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """What the seconds of a step are made of."""

    compute: float
    wait: float
    """For the slowest worker, and what a step takes beside."""
    reduce: float
    exchange: float
    update: float

    @property
    def seconds(self) -> float:
        return self.compute + self.wait + self.reduce + self.exchange + self.update


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A candidate, with what it would take."""

    candidate: Candidate
    parts: StepParts
    memory: Mapping[str, int]
    """By host, the bytes that are needed."""
    missing: Mapping[str, int]
    """By host that has too few, how many are missing."""
    reason: str

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.parts.seconds

    @property
    def fits(self) -> bool:
        return not self.missing


def predict(candidate: Candidate, hosts: Sequence[Host], work: Work) -> Prediction:
    """What a step of a candidate takes, by the profiles of these hosts, and whether it fits."""
    chosen = [host for host in hosts if host.name in candidate.workers]
    memory = {host.name: needed(host, candidate.workers[host.name], work, hosts) for host in chosen}
    missing = {
        host.name: memory[host.name] - host.memory
        for host in chosen
        if memory[host.name] > host.memory
    }
    parts = _parts(candidate, chosen, work)
    return Prediction(
        candidate=candidate, parts=parts, memory=memory, missing=missing,
        reason=_reason(parts, missing),
    )  # fmt: skip


def needed(host: Host, workers: int, work: Work, hosts: Sequence[Host] = ()) -> int:
    """The bytes that so many workers of a host need, beyond what its processes have already."""
    memory = host.profile.memory
    slots = work.shards + (most_subtrees(work.shards) + 1 if len(hosts) > 1 else 0)
    shared = 2 * memory.state + max(slots, memory.slots) * memory.slot
    return shared + workers * host.profile.worker_bytes


@dataclass(frozen=True, kw_only=True)
class _HostParts:
    """The same of one host, if it were alone in its pace."""

    mean: float
    """Its workers' computing."""
    longest: float
    own_sums: float
    """Before hosts exchange anything."""
    all_sums: float
    optimizer: float
    rest: float


def _parts(candidate: Candidate, chosen: Sequence[Host], work: Work) -> StepParts:
    group = work.shards // work.groups if work.groups else 0
    placement = ShardPlacement.of(work.shards, candidate.workers, group)
    hosts = [_host_parts(host, placement, work) for host in chosen]
    slowest = max(hosts, key=lambda each: each.longest + each.own_sums)
    last = max(hosts, key=lambda each: each.all_sums + each.optimizer + each.rest)
    waiting = slowest.longest - slowest.mean + last.rest
    return StepParts(
        compute=max(slowest.mean + min(waiting, 0.0), 0.0),
        wait=max(waiting, 0.0),
        reduce=slowest.own_sums + last.all_sums,
        exchange=_exchange_seconds(placement, chosen, work),
        update=last.optimizer,
    )


def _host_parts(host: Host, placement: ShardPlacement, work: Work) -> _HostParts:
    own, profile = placement.part(host.name), host.profile
    several = len(placement.parts) > 1 or work.groups > 0
    shard, sums = profile.shard_seconds(work.samples, own.workers), profile.sum_seconds(own.workers)
    before = len(own.shards) - len(own.subtrees) if several else 0
    leaves = len(placement.subtrees) if several else work.shards
    teams = team_count(own.workers, work.team)
    return _HostParts(
        mean=len(own.shards) / own.workers * shard,
        longest=-(-len(own.shards) // teams) * shard / min(work.team, own.workers),
        own_sums=before * sums,
        all_sums=(leaves - 1) * sums,
        optimizer=profile.optimizer_seconds(own.workers),
        rest=profile.rest_seconds(own.workers),
    )


def _exchange_seconds(placement: ShardPlacement, chosen: Sequence[Host], work: Work) -> float:
    """Until the slowest link has moved what its host sends, or receives."""
    if len(chosen) < 2:
        return 0.0
    slot = chosen[0].profile.memory.slot * COMPRESSED[work.compression]
    trees = {host.name: len(placement.part(host.name).subtrees) for host in chosen}
    seconds = 0.0
    for host in chosen:
        link = host.link
        if link is None:
            continue
        others = sum(trees.values()) - trees[host.name]
        if len(chosen) <= DIRECT or work.compression != "none":
            moved, rounds = slot * max(others, trees[host.name] * (len(chosen) - 1)), 1
        else:  # each sums, or updates, a part, and returns it
            share = 1 / len(chosen)
            sent = trees[host.name] * (1 - share) + share * (len(chosen) - 1)
            moved, rounds = slot * max(sent, others * share + (1 - share)), 2
        seconds = max(seconds, rounds * link.latency + moved / link.rate)
    return seconds


def _reason(parts: StepParts, missing: Mapping[str, int]) -> str:
    if missing:
        listed = ", ".join(f"{size / 2**20:,.0f} MiB on {name}" for name, size in missing.items())
        return f"does not fit: {listed} are missing"
    named = {
        "computing": parts.compute, "waiting": parts.wait, "summing": parts.reduce,
        "exchanging": parts.exchange, "updating": parts.update,
    }  # fmt: skip
    name = max(named, key=lambda each: named[each])
    return f"{named[name] / parts.seconds:.0%} of it {name}" if parts.seconds > 0 else ""
