"""What hosts exchange in a step, so that all of them sum the same tree: pure arithmetic.

Each host computes a run of consecutive shards. The run falls into complete subtrees of the tree
along which all shards are summed; their sums are sent to every other host, which puts each in the
place of the subtree's first shard and leaves the places of its others empty. The tree over these
places adds the same numbers in the same order as one host would: who computes what changes no bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.planning.memory_layout import Range
from lockstep.planning.sampling import home_shards


def subtrees(shards: int, first: int, last: int) -> list[range]:
    """The fewest complete subtrees, of the tree over `shards`, that are the run `first:last`."""
    found = []
    while first < last:
        size = 1
        while first % (2 * size) == 0 and size < shards and min(first + 2 * size, shards) <= last:
            size *= 2
        found.append(range(first, min(first + size, shards)))
        first = found[-1].stop
    return found


def most_subtrees(shards: int) -> int:
    """How many subtrees of more than one shard a run can have."""
    return min(shards // 2, 2 * max((shards - 1).bit_length() - 1, 1)) if shards > 1 else 0


@dataclass(frozen=True, kw_only=True)
class HostPart:
    """One host's part in an arrangement."""

    name: str
    workers: int
    shards: range
    """The shards that it computes."""
    subtrees: tuple[range, ...]
    """The same, as complete subtrees."""


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """Which host computes which shards, as long as the hosts stay the same."""

    shards: int
    parts: tuple[HostPart, ...]

    @staticmethod
    def of(
        shards: int,
        workers: Mapping[str, int],
        group: int = 0,
        owned: Mapping[str, range] | None = None,
    ) -> Arrangement:
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
                HostPart(
                    name=name,
                    workers=count,
                    shards=range(first, last),
                    subtrees=tuple(trees),
                )
            )
        return Arrangement(shards=shards, parts=tuple(parts))

    @property
    def subtrees(self) -> tuple[range, ...]:
        """All hosts' subtrees, in order: together they cover all shards."""
        return tuple(tree for part in self.parts for tree in part.subtrees)

    def part(self, name: str) -> HostPart:
        return next(part for part in self.parts if part.name == name)

    def others(self, name: str) -> tuple[HostPart, ...]:
        return tuple(part for part in self.parts if part.name != name)


@dataclass(frozen=True, kw_only=True)
class TableMap:
    """Where a large table's gradient lies in a slot."""

    home: Range
    """Its rows."""
    row_bytes: int
    numbers: Range
    """Their count, or -1 for all; then their numbers; int64."""


BUCKET_BYTES = 512 << 10
"""Gradients are sent in runs of about this size: small enough to go while the backward pass goes
on, large enough that what each costs by itself does not count."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Gradients that are sent at once."""

    params: tuple[int, ...]
    place: Range


def fill_buckets(places: Mapping[int, Range]) -> tuple[Bucket, ...]:
    """Cut gradients into buckets, by parameter: the last layers' first, as they are made."""
    buckets: list[Bucket] = []
    for param in sorted(places, reverse=True):
        place = places[param]
        if buckets and buckets[-1].params[-1] == param + 1:
            last = buckets[-1]
            if last.place.nbytes + place.nbytes <= BUCKET_BYTES:
                end = last.place.offset + last.place.nbytes
                joined = Range(offset=place.offset, nbytes=end - place.offset)
                buckets[-1] = Bucket(params=(*last.params, param), place=joined)
                continue
        buckets.append(Bucket(params=(param,), place=place))
    return tuple(buckets)


@dataclass(frozen=True, kw_only=True)
class SlotMap:
    """What of a slot is exchanged. Offsets are within the slot, in bytes."""

    nbytes: int
    grads: Mapping[int, Range]
    """Where each gradient lies, by parameter, without those of large tables."""
    tables: tuple[TableMap, ...]
    buffers: Range
    """What the shard's forward pass has left in the model's buffers."""
    packed: Range
    """Room for gradients made small; used of slots from `restored` on."""
    total: int
    """The slot of the sum of all shards: behind theirs, and those of subtrees."""
    restored: int
    """The first of the slots of groups, where gradients are made small."""

    @functools.cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """The gradients, as they are sent."""
        return fill_buckets(self.grads)

    def to_message(self) -> dict[str, Any]:
        """JSON-ready."""
        fields = dataclasses.asdict(self)
        return {**fields, "grads": list(fields["grads"].items())}  # JSON's keys are texts

    @staticmethod
    def from_message(message: Mapping[str, Any]) -> SlotMap:
        tables = tuple(
            TableMap(
                home=Range(**table["home"]),
                row_bytes=table["row_bytes"],
                numbers=Range(**table["numbers"]),
            )
            for table in message["tables"]
        )
        return SlotMap(
            nbytes=message["nbytes"],
            grads={param: Range(**place) for param, place in message["grads"]},
            tables=tables,
            buffers=Range(**message["buffers"]),
            packed=Range(**message["packed"]),
            total=message["total"],
            restored=message["restored"],
        )


AGAIN = 2
"""The flag of a gradient that was changed after it had been there: it is sent again."""
FRAME_BYTES = 64 << 20
"""The most that is sent at once."""


def cut(item: Range, most: int = FRAME_BYTES) -> Iterator[Range]:
    """A range in pieces that can be sent, of at most so many bytes."""
    for start in range(0, item.nbytes, most):
        yield Range(offset=item.offset + start, nbytes=min(most, item.nbytes - start))


def leaf_slots(parts: Sequence[range], mine: range, shards: int) -> dict[int, int]:
    """For each subtree, by its first shard, the slot that has its sum.

    Sums that this host makes itself, of more than one shard, lie behind the shards' own slots: the
    gradients that they are made of are still needed, should a worker die.
    """
    found, behind = {}, shards
    for tree in parts:
        if len(tree) > 1 and tree.start in mine:
            found[tree.start] = behind
            behind += 1
        else:
            found[tree.start] = tree.start
    return found
