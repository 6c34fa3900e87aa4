"""Candidates: the ways to run a job on the hosts that there are that change no bit of its results.

How many workers each host has, and which hosts take part at all. What changes numbers (shards,
threads, precision, compression, local steps) is the job's, and is never searched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lockstep.planning.core_split import worker_counts
from lockstep.planning.job_profile import JobProfile
from lockstep.planning.shard_placement import share

MOST_SUBSETS = 6
"""So many other hosts are combined in all ways; of more, the first ones are taken: 1, 2, 3, ..."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What a host is connected with to the others."""

    latency: float
    """Seconds for a message there."""
    rate: float
    """Bytes per second in each direction, as the transport moves them."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host that could take part."""

    name: str
    most_workers: int
    """By its cores and the threads of a worker, or as it was told."""
    memory: int
    """Bytes that can still be had."""
    profile: JobProfile
    """The job's costs on it."""
    link: Link | None = None
    """None: there is no other host."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to run a job."""

    workers: Mapping[str, int]
    """By host that takes part; the master's is the first."""

    @property
    def total(self) -> int:
        return sum(self.workers.values())

    def __str__(self) -> str:
        if len(self.workers) == 1:
            return "1 worker" if self.total == 1 else f"{self.total} workers"
        return " + ".join(f"{name}: {count}" for name, count in self.workers.items())


def candidates(
    hosts: Sequence[Host],
    shards: int,
    workers: int | None = None,
    *,
    all_hosts: bool = False,
    team: int = 1,
) -> list[Candidate]:
    """All of them, the preferred one first: fewer hosts, then more workers.

    Args:
        hosts: the master's first; it always takes part.
        shards: V. There are never more workers, or teams, than that.
        workers: how many there are, where the job says so.
        all_hosts: whether no host may be left out.
        team: how many workers compute a shard together.
    """
    found: dict[tuple[tuple[str, int], ...], Candidate] = {}
    for chosen in _subsets(hosts, all_hosts=all_hosts):
        capacities = {host.name: host.most_workers for host in chosen}
        most = max(team, min(sum(capacities.values()), shards * team))
        for total in [workers] if workers is not None else worker_counts(most):
            if total >= max(len(chosen), team):
                for each in _shared(total, capacities):
                    found[tuple(each.items())] = Candidate(workers=each)
    return list(found.values())


def _shared(total: int, capacities: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """The workers shared out in proportion; nothing where some host would have none."""
    before, whole = 0, sum(capacities.values())
    cuts = [0]
    for count in capacities.values():
        before += count
        cuts.append(total * before // whole)
    if all(b > a for a, b in itertools.pairwise(cuts)):
        yield share(total, capacities)


def _subsets(hosts: Sequence[Host], *, all_hosts: bool) -> Iterator[list[Host]]:
    first, others = hosts[0], hosts[1:]
    if all_hosts:
        yield list(hosts)
    elif len(others) <= MOST_SUBSETS:
        for count in range(len(others) + 1):
            for some in itertools.combinations(others, count):
                yield [first, *some]
    else:
        for count in range(len(others) + 1):
            yield [first, *others[:count]]
