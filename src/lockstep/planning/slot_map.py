"""Slot map: where a slot has what hosts exchange in a step, and the buckets that they send.

Each host computes a run of consecutive shards, which falls into complete subtrees of the reduction
tree. Their sums are sent to every other host, which puts each in the slot of the subtree's first
shard and leaves those of its others empty. The tree over these slots adds the same numbers in the
same order as one host would: who computes what changes no bit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lockstep.planning.byte_ranges import ByteRange


@dataclass(frozen=True, kw_only=True)
class TableMap:
    """Where a large table's gradient lies in a slot."""

    rows: ByteRange
    row_bytes: int
    row_indices: ByteRange
    """The count of rows that are there, or -1 for all; then their indices; int64."""


BUCKET_BYTES = 512 << 10
"""Gradients are sent in runs of about this size: small enough to go while the backward pass goes
on, large enough that what each costs by itself does not count."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Gradients that are sent at once."""

    params: tuple[int, ...]
    byte_range: ByteRange


def fill_buckets(ranges: Mapping[int, ByteRange]) -> tuple[Bucket, ...]:
    """Cut gradients into buckets, by parameter: the last layers' first, as they are made."""
    buckets: list[Bucket] = []
    for param in sorted(ranges, reverse=True):
        run = ranges[param]
        if buckets and buckets[-1].params[-1] == param + 1:
            last = buckets[-1]
            if last.byte_range.nbytes + run.nbytes <= BUCKET_BYTES:
                end = last.byte_range.offset + last.byte_range.nbytes
                joined = ByteRange(offset=run.offset, nbytes=end - run.offset)
                buckets[-1] = Bucket(params=(*last.params, param), byte_range=joined)
                continue
        buckets.append(Bucket(params=(param,), byte_range=run))
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
    slice_of: Mapping[int, int]
    """By parameter that is a slice of a matrix, or belongs to one: which slice."""

    @functools.cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """The gradients, as they are sent."""
        return fill_buckets(self.grads)


AGAIN = 2
"""The flag of a gradient that was changed after it had been there: it is sent again."""
FRAME_BYTES = 64 << 20
"""The most that is sent at once."""


def cut(item: ByteRange, most: int = FRAME_BYTES) -> Iterator[ByteRange]:
    """A range in pieces that can be sent, of at most so many bytes."""
    for start in range(0, item.nbytes, most):
        yield ByteRange(offset=item.offset + start, nbytes=min(most, item.nbytes - start))
