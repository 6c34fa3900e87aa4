"""Shard placement: which host computes which shards, as complete subtrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lockstep.errors import JobError
from lockstep.planning.reduction_tree import subtrees
from lockstep.planning.sampling import home_shards


@dataclass(frozen=True, kw_only=True)
class HostShards:
    """One host's part in an arrangement."""

    name: str
    workers: int
    shards: range
    """The shards that it computes."""
    subtrees: tuple[range, ...]
    """The same, as complete subtrees; none where all hosts compute each shard together."""

    @property
    def given(self) -> range:
        """The shards whose results other hosts get from it."""
        return self.shards if self.subtrees else self.shards[:0]


@dataclass(frozen=True, kw_only=True)
class ShardPlacement:
    """Which host computes which shards, as long as the hosts stay the same."""

    shards: int
    parts: tuple[HostShards, ...]

    @staticmethod
    def of(
        shards: int,
        workers: Mapping[str, int],
        group: int = 0,
        owned: Mapping[str, range] | None = None,
    ) -> ShardPlacement:
        """Divide the shards among hosts, in this order, by their numbers of workers.

        `group`: hosts get whole groups of so many shards, which are summed by themselves; 0: there
        are none. `owned`: by host, the shards that nobody else can compute, if they have been
        divided so.
        """
        total, before = sum(workers.values()), 0
        parts = []
        unit = group or 1
        for name, count in workers.items():
            first = unit * home_shards(shards // unit, total, before).start
            before += count
            last = unit * home_shards(shards // unit, total, before - 1).stop if count else first
            if owned:
                first, last = owned[name].start, owned[name].stop
            trees = subtrees(shards, first, last)
            if group:
                trees = [range(start, start + group) for start in range(first, last, group)]
            parts.append(
                HostShards(
                    name=name,
                    workers=count,
                    shards=range(first, last),
                    subtrees=tuple(trees),
                )
            )
        return ShardPlacement(shards=shards, parts=tuple(parts))

    @staticmethod
    def together(shards: int, workers: Mapping[str, int]) -> ShardPlacement:
        """All hosts compute each shard together."""
        parts = (
            HostShards(name=name, workers=count, shards=range(shards), subtrees=())
            for name, count in workers.items()
        )
        return ShardPlacement(shards=shards, parts=tuple(parts))

    @property
    def teams(self) -> int:
        """How many shards hosts can compute together at a time: each worker has a partner on each
        host."""
        return min(part.workers for part in self.parts)

    @property
    def subtrees(self) -> tuple[range, ...]:
        """All hosts' subtrees, in order: together they cover all shards."""
        return tuple(tree for part in self.parts for tree in part.subtrees)

    def part(self, name: str) -> HostShards:
        return next(part for part in self.parts if part.name == name)

    def others(self, name: str) -> tuple[HostShards, ...]:
        return tuple(part for part in self.parts if part.name != name)


def share(workers: int, capacities: Mapping[str, int]) -> dict[str, int]:
    """Share workers out among hosts, in proportion to what each would run.

    Raises:
        JobError: some host would have none.
    """
    total, before = sum(capacities.values()), 0
    shares = {}
    for name, capacity in capacities.items():
        shares[name] = workers * (before + capacity) // total - workers * before // total
        before += capacity
    idle = [name for name, count in shares.items() if not count]
    if idle:
        raise JobError(
            "there are too few workers for all hosts",
            expected=f"at least one for each of {len(capacities)} hosts",
            found=f"{workers}; host {', '.join(idle)} would have none",
            fix="ask for more workers (and shards), or use fewer hosts",
        )
    return shares


def share_batches(
    batches: Sequence[int], workers: Mapping[str, int], master: str
) -> dict[str, list[int]]:
    """Share held-out batches out among hosts by their workers; the master has the first ones."""
    total, before = sum(workers.values()), workers[master]
    rest = list(batches[: len(batches) * before // total + 1])
    shares = {master: rest}
    for name, count in workers.items():
        if name != master:
            first = max(len(rest), len(batches) * before // total)
            before += count
            shares[name] = list(batches[first : len(batches) * before // total])
    return shares
