"""What hosts exchange in a step, so that all of them sum the same tree: pure arithmetic.

Each host computes a run of consecutive shards. The run falls into complete subtrees of the tree
along which all shards are summed; their sums are sent to every other host, which puts each in the
place of the subtree's first shard and leaves the places of its others empty. The tree over these
places adds the same numbers in the same order as one host would: who computes what changes no bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.planning.byte_ranges import ByteRange


@dataclass(frozen=True, kw_only=True)
class TableMap:
    """Where a large table's gradient lies in a slot."""

    home: ByteRange
    """Its rows."""
    row_bytes: int
    numbers: ByteRange
    """Their count, or -1 for all; then their numbers; int64."""


BUCKET_BYTES = 512 << 10
"""Gradients are sent in runs of about this size: small enough to go while the backward pass goes
on, large enough that what each costs by itself does not count."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Gradients that are sent at once."""

    params: tuple[int, ...]
    place: ByteRange


def fill_buckets(places: Mapping[int, ByteRange]) -> tuple[Bucket, ...]:
    """Cut gradients into buckets, by parameter: the last layers' first, as they are made."""
    buckets: list[Bucket] = []
    for param in sorted(places, reverse=True):
        place = places[param]
        if buckets and buckets[-1].params[-1] == param + 1:
            last = buckets[-1]
            if last.place.nbytes + place.nbytes <= BUCKET_BYTES:
                end = last.place.offset + last.place.nbytes
                joined = ByteRange(offset=place.offset, nbytes=end - place.offset)
                buckets[-1] = Bucket(params=(*last.params, param), place=joined)
                continue
        buckets.append(Bucket(params=(param,), place=place))
    return tuple(buckets)


@dataclass(frozen=True, kw_only=True)
class SlotMap:
    """What of a slot is exchanged. Offsets are within the slot, in bytes."""

    nbytes: int
    grads: Mapping[int, ByteRange]
    """Where each gradient lies, by parameter, without those of large tables."""
    tables: tuple[TableMap, ...]
    buffers: ByteRange
    """What the shard's forward pass has left in the model's buffers."""
    packed: ByteRange
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
                home=ByteRange(**table["home"]),
                row_bytes=table["row_bytes"],
                numbers=ByteRange(**table["numbers"]),
            )
            for table in message["tables"]
        )
        return SlotMap(
            nbytes=message["nbytes"],
            grads={param: ByteRange(**place) for param, place in message["grads"]},
            tables=tables,
            buffers=ByteRange(**message["buffers"]),
            packed=ByteRange(**message["packed"]),
            total=message["total"],
            restored=message["restored"],
        )


AGAIN = 2
"""The flag of a gradient that was changed after it had been there: it is sent again."""
FRAME_BYTES = 64 << 20
"""The most that is sent at once."""


def cut(item: ByteRange, most: int = FRAME_BYTES) -> Iterator[ByteRange]:
    """A range in pieces that can be sent, of at most so many bytes."""
    for start in range(0, item.nbytes, most):
        yield ByteRange(offset=item.offset + start, nbytes=min(most, item.nbytes - start))
