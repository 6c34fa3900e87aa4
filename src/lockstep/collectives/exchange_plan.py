"""Exchange plan: what of a step goes from one host to another, and where in memory it belongs.

The same code on both sides says what is sent and what is expected, in the same order: an item's
tag is its index in that order.
"""

from __future__ import annotations

import enum
import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lockstep.errors import ProtocolError
from lockstep.planning.byte_ranges import ByteRange, overlap
from lockstep.planning.digest_sample import plan_digest_sample
from lockstep.planning.memory_layout import Layout
from lockstep.planning.ownership import Duties
from lockstep.planning.reduction_tree import leaf_slots
from lockstep.planning.shard_placement import HostShards, ShardPlacement
from lockstep.planning.slot_map import AGAIN, Bucket, SlotMap, TableMap, cut
from lockstep.state.control_segment import MOST_LOGGED, NAMES_BYTES, RING, ControlSegment
from lockstep.state.shard_outcomes import decode_names, names_of

Item = tuple[int, memoryview]
"""A tag, and the memory that it is about."""


class Field(enum.IntEnum):
    """When in a step an item goes; the first part of its tag."""

    GRADIENT = 0
    BESIDE = 1
    TOLD = 2
    NORMS = 3
    RETURNED = 4


def tagged(field: Field, views: Iterable[memoryview]) -> Iterator[Item]:
    """The views with their tags."""
    for number, view in enumerate(views):
        yield field << 28 | number, view


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """A subtree's sum of a bucket, as far as it is for one owner."""

    tree: range
    params: tuple[int, ...]
    """None, if it is made small: all of it goes at once, when it is summed."""
    items: list[Item]


class ExchangePlan:
    """What this host, `node`, gives others and gets from them, under one arrangement."""

    def __init__(
        self,
        control: ControlSegment,
        slots: memoryview,
        state: memoryview,
        places: SlotMap,
        layout: Layout,
        arrangement: ShardPlacement,
        duties: Duties,
        node: str,
    ) -> None:
        self.control, self.places, self.duties = control, places, duties
        self.mine = arrangement.part(node)
        self.others = arrangement.others(node)
        self._slots, self._state = slots, state
        self._leaves = leaf_slots(arrangement.subtrees, self.mine.shards, arrangement.shards)
        self._groups = {tree.start: place for place, tree in enumerate(arrangement.subtrees)}
        self._audit = plan_digest_sample(layout)
        self._params = {
            name: layout.ranges_of(share.params, ("param",))
            for name, share in duties.shares.items()
        }
        mine = self.mine.name
        self._met = {part.name: memoryview(bytearray(1)) for part in arrangement.parts}
        """By host, a byte that goes when it has updated its parameters: none is a step ahead."""
        self._gradients = {
            (sender.name, owner): list(self._list_gradients(sender, owner))
            for sender in arrangement.parts
            for owner in ([part.name for part in self.others] if sender.name == mine else [mine])
        }

    def _list_gradients(self, sender: HostShards, owner: str) -> Iterator[Gradient]:
        numbers = itertools.count(Field.GRADIENT << 28)
        if self.places.packed.nbytes:
            for tree in sender.subtrees:
                slot = self.places.restored + self._groups[tree.start]
                views = [self._view(slot, piece) for piece in cut(self.places.packed)]
                items = [(next(numbers), view) for view in views]
                yield Gradient(tree=tree, params=(), items=items)
            return
        for tree in sender.subtrees:
            for bucket in self.places.buckets:
                views = [self._leaf(tree, run) for run in self._runs_of(bucket, owner)]
                items = [(next(numbers), view) for view in views]
                yield Gradient(tree=tree, params=bucket.params, items=items)

    def _runs_of(self, bucket: Bucket, owner: str) -> list[ByteRange]:
        """What of a bucket an owner sums."""
        if self.duties.returns == "nothing":
            return list(cut(bucket.byte_range))
        common = [overlap(bucket.byte_range, run) for run in self.duties.shares[owner].sums]
        return [piece for run in common for piece in cut(run)]

    # The gradients, and what goes beside them.

    def gradients(self, sender: HostShards, owner: str) -> Sequence[Gradient]:
        """What a host gives to an owner, in the order in which it is sent if nothing is early."""
        return self._gradients[sender.name, owner]

    def known(self, step: int, sender: HostShards, owner: str) -> Iterator[Item]:
        """What a host gives to an owner in every step; its size is known beforehand."""
        for gradient in self.gradients(sender, owner):
            yield from gradient.items
        yield from self.beside(step, sender)

    def beside(self, step: int, sender: HostShards) -> Iterator[Item]:
        """What goes beside the gradients; the flags and counts say what else is to come."""
        return tagged(Field.BESIDE, self._beside(step, sender))

    def _beside(self, step: int, sender: HostShards) -> Iterator[memoryview]:
        control, shards = self.control, sender.given
        if shards:
            run = slice(shards.start, shards.stop)
            yield control.outcomes[step % RING, run].view(np.uint8).data
            yield control.has_grad[run].reshape(-1).data
        if self.places.buffers.nbytes:
            for shard in shards:
                yield self._view(shard, self.places.buffers)
        for tree in sender.subtrees:
            for table in self.places.tables:
                yield self._leaf(tree, ByteRange(offset=table.row_indices.offset, nbytes=8))

    def told(self, step: int, sender: HostShards, owner: str) -> Iterator[Item]:
        """What the flags and counts of a host tell of: gradients that have changed after they were
        sent, the rows of large tables that were touched, and what the task has logged."""
        return tagged(
            Field.TOLD, itertools.chain(self._told(sender, owner), self._logged(step, sender))
        )

    def _logged(self, step: int, sender: HostShards) -> Iterator[memoryview]:
        control, place = self.control, step % RING
        for shard in sender.given:
            if control.names_bytes[place, shard]:
                yield control.names[shard, : control.names_bytes[place, shard]].data
                count = control.logged_counts[place, shard]
                yield control.logged[place, shard, :count].data.cast("B")

    def _told(self, sender: HostShards, owner: str) -> Iterator[memoryview]:
        shards = sender.given
        again = self.control.has_grad[shards.start : shards.stop] == AGAIN
        if not self.places.packed.nbytes and again.any():
            for gradient in self.gradients(sender, owner):
                tree = gradient.tree
                flags = self.control.has_grad[tree.start, gradient.params]
                if len(tree) == 1 and (flags == AGAIN).any():
                    yield from (view for _, view in gradient.items)
        for tree in sender.subtrees:
            for table in self.places.tables:
                yield from self._rows(tree, table)

    def _rows(self, tree: range, table: TableMap) -> Iterator[memoryview]:
        count, rows = self._count(tree, table), table.rows
        if count >= 0:
            rows = ByteRange(offset=rows.offset, nbytes=count * table.row_bytes)
            numbers = ByteRange(offset=table.row_indices.offset + 8, nbytes=8 * count)
            yield from (self._leaf(tree, piece) for piece in cut(numbers))
        yield from (self._leaf(tree, piece) for piece in cut(rows))

    # What has come, before anybody takes it for true.

    def check(self, sender: HostShards) -> None:
        """Check the flags and counts that a host has sent: what follows lies where they say.

        Raises:
            ProtocolError: they cannot be.
        """
        flags = self.control.has_grad[sender.given.start : sender.given.stop]
        if flags.size and int(flags.max()) > AGAIN:
            raise _untrue(sender, "a flag", f"at most {AGAIN}", str(int(flags.max())))
        for tree in sender.subtrees:
            for table in self.places.tables:
                count, most = self._count(tree, table), table.rows.nbytes // table.row_bytes
                if not -1 <= count <= most:
                    found = f"{count:,}"
                    raise _untrue(sender, "a number of rows", f"-1 to {most:,}", found)

    def check_counts(self, step: int, sender: HostShards) -> None:
        """Check how much a host says that its shards have logged.

        Raises:
            ProtocolError: it cannot be.
        """
        run = slice(sender.given.start, sender.given.stop)
        for what, counts, most in (
            ("a number of values", self.control.logged_counts[step % RING, run], MOST_LOGGED),
            ("a length of names", self.control.names_bytes[step % RING, run], NAMES_BYTES),
        ):
            wrong = counts[(counts < 0) | (counts > most)]
            if wrong.size:
                raise _untrue(sender, what, f"0 to {most}", str(int(wrong[0])))

    def check_names(self, step: int, sender: HostShards) -> None:
        """Check the names of what a host's shards have logged.

        Raises:
            ProtocolError: they are not as many as the values, or no names.
        """
        for shard in sender.given:
            count = int(self.control.logged_counts[step % RING, shard])
            try:
                found = len(decode_names(names_of(self.control, step, shard)))
            except ValueError:
                found = -1
            if found != count:
                raise _untrue(sender, "names of values", f"{count} of them", f"{found}")

    def check_rows(self, sender: HostShards) -> None:
        """Check the indices of the rows that a host has sent: owners look for them in order.

        Raises:
            ProtocolError: they do not ascend, or are no rows of the table.
        """
        for tree in sender.subtrees:
            for table in self.places.tables:
                count, most = self._count(tree, table), table.rows.nbytes // table.row_bytes
                if count <= 0:
                    continue
                start = table.row_indices.offset + 8
                numbers = self._leaf(tree, ByteRange(offset=start, nbytes=8 * count))
                indices = np.frombuffer(numbers, np.int64)
                ascend = bool((indices[1:] > indices[:-1]).all())
                if not ascend or indices[0] < 0 or indices[-1] >= most:
                    found = "others" if ascend else "indices that do not ascend"
                    raise _untrue(sender, "indices of rows", f"ascending, below {most:,}", found)

    def _count(self, tree: range, table: TableMap) -> int:
        where = ByteRange(offset=table.row_indices.offset, nbytes=8)
        return int(struct.unpack("=q", self._leaf(tree, where))[0])

    # What an owner returns.

    def norms(self, owner: str) -> Iterator[Item]:
        """The norms of the gradients of its parameters."""
        params = self.duties.shares[owner].params
        return tagged(
            Field.NORMS, (self.control.norms[param : param + 1].data.cast("B") for param in params)
        )

    def returned(self, step: int, owner: str) -> Iterator[Item]:
        """The sums that it has made, or what has become of its parameters, or digests of them."""
        return tagged(Field.RETURNED, self._returned(step, owner))

    def _returned(self, step: int, owner: str) -> Iterator[memoryview]:
        if self.duties.returns == "sums":
            for run in self.duties.shares[owner].sums:
                yield from (self._view(self.places.total, piece) for piece in cut(run))
            return
        given = self._params[owner] if self.duties.returns == "parameters" else []
        for run in given:
            for piece in cut(run):
                yield self._state[piece.offset : piece.offset + piece.nbytes]
        if self.duties.returns == "digests":  # of some steps there is no other word
            yield self._met[owner]
        for index, _ in self.audited(step, owner):
            yield self.control.digest_bytes(step, index)

    def audited(self, step: int, owner: str) -> list[tuple[int, memoryview]]:
        """What of the units that the ledger records of a step only this owner has, by index."""
        alone, _ = self._audit.split(step, self.duties.shares[owner].params)
        return [
            (index, self._state[unit.offset : unit.offset + unit.nbytes])
            for index, unit in alone.items()
        ]

    # Where it lies.

    def _leaf(self, tree: range, item: ByteRange) -> memoryview:
        """A run of the slot that has the subtree's sum."""
        return self._view(self._leaves[tree.start], item)

    def _view(self, slot: int, item: ByteRange) -> memoryview:
        start = slot * self.places.nbytes + item.offset
        return self._slots[start : start + item.nbytes]


def _untrue(sender: HostShards, what: str, expected: str, found: str) -> ProtocolError:
    return ProtocolError(f"host {sender.name} sends {what} that cannot be", expected=expected,
                         found=found)  # fmt: skip
