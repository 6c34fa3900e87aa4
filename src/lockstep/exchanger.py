"""The exchanger: a thread of the agent that gives other hosts what its workers have computed.

It sees the same shared memory as the workers and takes part in each step by a word of its own: it
waits until all of its host's workers have summed their gradients, sends these to every other host,
straight from the slots, receives theirs straight into the slots, and lets the workers go on.
"""

from __future__ import annotations

import enum
import itertools
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from lockstep import futex
from lockstep.control import RING, Control, Phase, progress_of
from lockstep.errors import NetworkError, PeerTimeoutError
from lockstep.exchange import AGAIN, Arrangement, HostPart, SlotMap, TableMap, cut, leaf_slots
from lockstep.layout import Range
from lockstep.net.frames import Kind
from lockstep.net.transport import Key, Pending, Transport

LOOK_SECONDS = 0.1
"""Between two looks at whether the exchange is called off."""
NAP = 0.02


class Field(enum.IntEnum):
    """What a tensor between hosts is; the first part of its key's tag."""

    LOSSES = 0
    FLAGS = 1
    BUFFERS = 2
    COUNTS = 3
    BUCKET = 4
    NUMBERS = 5
    ROWS = 6
    AGAIN = 7


Item = tuple[int, memoryview]
"""A tag, and the memory that it is about."""


def tag_of(field: Field, shard: int = 0, run: int = 0) -> int:
    """The tag of a field of a shard's slot."""
    return field << 28 | shard << 12 | run


class Early:
    """Whether gradients are sent while the backward pass goes on.

    That hides the time on the wire, but what encrypts and sends takes cores from the workers. So
    where there is no core to spare it is done only on links that are slow, as they are measured in
    one step of so many without it.
    """

    PROBE_STEPS = 64
    SLOW = 250e6
    """Bytes per second."""

    def __init__(self, nbytes: int, *, spare: bool) -> None:
        """`nbytes` come in each step; `spare`: there are more cores than threads that compute."""
        self._spare, self._slow, self._limit = spare, False, nbytes / self.SLOW

    def at(self, step: int) -> bool:
        return self._spare or (self._slow and step % self.PROBE_STEPS != 0)

    def took(self, seconds: float) -> None:
        """In a step without it, what came was waited for so long."""
        self._slow = seconds > self._limit


class CalledOff(Exception):
    """The hosts are being regrouped."""


class Exchanger:
    """One host's exchanges under one arrangement. `failed` is told, once, why it has ended."""

    def __init__(
        self,
        control: Control,
        slots: memoryview,
        places: SlotMap,
        transport: Transport,
        arrangement: Arrangement,
        seats: Callable[[], Sequence[int]],
        failed: Callable[[NetworkError], None],
        *,
        spare: bool,
    ) -> None:
        """`seats` are the host's workers at any time; `spare`: it has cores besides theirs."""
        self.control, self.places, self.transport = control, places, transport
        self._slots, self._seats, self._failed = slots, seats, failed
        self.mine = arrangement.part(transport.node)
        self.others = arrangement.others(transport.node)
        self._leaves = leaf_slots(arrangement.subtrees, self.mine.shards, arrangement.shards)
        nbytes = sum(view.nbytes for other in self.others for _, view in self._known(0, other))
        self._early = Early(nbytes, spare=spare)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, step: int) -> None:
        """Exchange from this step on. Called when all workers rest."""
        self.control.exchanged = step
        self._thread = threading.Thread(
            target=self._run, args=(step,), name="lockstep exchanger", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Call it off and wait for the thread's end.

        What is under way uses memory until its peer is dropped.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, first: int) -> None:
        try:
            for step in itertools.count(first):
                self._exchange(step)
        except CalledOff:
            pass
        except NetworkError as error:
            self._failed(error)

    def _exchange(self, step: int) -> None:
        self._await_workers(progress_of(step - 1, Phase.UPDATED))  # they have read the last one's
        coming = [
            slip
            for other in self.others
            for slip in self._expect(step, self._known(step, other), other)
        ]
        early = self._early.at(step)
        going = self._send_gradients(step, early=early)
        going += self._send(step, self._beside(step, self.mine))
        going += self._send(step, self._told(self.mine))
        begun = time.monotonic()
        self._await_all(coming)
        if not early:
            self._early.took(time.monotonic() - begun)
        more = [
            slip for other in self.others for slip in self._expect(step, self._told(other), other)
        ]
        self._await_all([*more, *going])
        self.control.exchanged = step + 1

    # What is sent, and where it belongs: the same on both sides.

    def _known(self, step: int, host: HostPart) -> Iterator[Item]:
        """What every step has of a host's shards; its size is known beforehand."""
        for tree in host.subtrees:
            for number, bucket in enumerate(self.places.buckets):
                yield from self._pieces(Field.BUCKET, tree, number, bucket.place)
        yield from self._beside(step, host)

    def _beside(self, step: int, host: HostPart) -> Iterator[Item]:
        """What goes beside the gradients; the flags and counts say what else is to come."""
        control, shards = self.control, host.shards
        run = slice(shards.start, shards.stop)
        yield tag_of(Field.LOSSES), control.losses[step % RING, run].data.cast("B")
        yield tag_of(Field.FLAGS), control.has_grad[run].reshape(-1).data
        if self.places.buffers.nbytes:
            for shard in shards:
                yield tag_of(Field.BUFFERS, shard), self._view(shard, self.places.buffers)
        for tree in host.subtrees:
            for number, table in enumerate(self.places.tables):
                count = Range(offset=table.numbers.offset, nbytes=8)
                yield tag_of(Field.COUNTS, tree.start, number), self._leaf(tree, count)

    def _told(self, host: HostPart) -> Iterator[Item]:
        """What the flags and counts of a host tell of: gradients that have changed after they were
        sent, and the rows of large tables that were touched."""
        for tree in host.subtrees:
            if len(tree) == 1:
                for number, bucket in enumerate(self.places.buckets):
                    flags = self.control.has_grad[tree.start, bucket.params]
                    if (flags == AGAIN).any():
                        yield from self._pieces(Field.AGAIN, tree, number, bucket.place)
            for number, table in enumerate(self.places.tables):
                yield from self._rows(tree, number, table)

    def _rows(self, tree: range, number: int, table: TableMap) -> Iterator[Item]:
        (count,) = struct.unpack(
            "=q", self._leaf(tree, Range(offset=table.numbers.offset, nbytes=8))
        )
        rows = table.home
        if count >= 0:
            rows = Range(offset=rows.offset, nbytes=count * table.row_bytes)
            yield from self._pieces(
                Field.NUMBERS,
                tree,
                number,
                Range(offset=table.numbers.offset + 8, nbytes=8 * count),
            )
        yield from self._pieces(Field.ROWS, tree, number, rows)

    def _pieces(self, field: Field, tree: range, number: int, item: Range) -> Iterator[Item]:
        for place, piece in enumerate(cut(item)):
            yield tag_of(field, tree.start, number << 4 | place), self._leaf(tree, piece)

    def _leaf(self, tree: range, item: Range) -> memoryview:
        """A run of the slot that has the subtree's sum."""
        return self._view(self._leaves[tree.start], item)

    def _view(self, slot: int, item: Range) -> memoryview:
        start = slot * self.places.nbytes + item.offset
        return self._slots[start : start + item.nbytes]

    # Going and coming.

    def _send_gradients(self, step: int, *, early: bool) -> list[Pending]:
        """Send gradients, `early` as they come, until all workers have come to this step's sums,
        and then the rest. Of a subtree of several shards the sum goes, which comes last."""
        waiting = {
            (tree.start, bucket.params): list(
                self._pieces(Field.BUCKET, tree, number, bucket.place)
            )
            for tree in self.mine.subtrees
            for number, bucket in enumerate(self.places.buckets)
        }
        single = {tree.start for tree in self.mine.subtrees if early and len(tree) == 1}
        going: list[Pending] = []

        def look() -> None:
            for shard, params in list(waiting):
                if shard in single and (self.control.ready[shard, params] == step + 1).all():
                    going.extend(self._send(step, waiting.pop((shard, params))))

        self._await_workers(progress_of(step, Phase.SUMMED), look)
        for items in waiting.values():
            going += self._send(step, items)
        return going

    def _send(self, step: int, items: Iterable[Item]) -> list[Pending]:
        """Send to all others."""
        return [
            self.transport.send(other.name, Key(Kind.PARTIAL, step, tag), view)
            for tag, view in items
            for other in self.others
        ]

    def _expect(self, step: int, items: Iterable[Item], other: HostPart) -> list[Pending]:
        return [
            self.transport.expect(other.name, Key(Kind.PARTIAL, step, tag), view)
            for tag, view in items
        ]

    # Waits: each ends when the hosts are regrouped.

    def _await_workers(self, progress: int, look: Callable[[], None] = lambda: None) -> None:
        """Wait until every worker of this host has come so far, whoever they are; `look` is called
        whenever there may be something new."""
        control = self.control
        while True:
            bell, seats = control.bell, self._seats()
            there = bool(seats) and all(control.progress(seat) >= progress for seat in seats)
            if self._stop.is_set():
                raise CalledOff
            look()
            if there:
                return
            futex.wait(control.bell_address, bell, NAP)

    def _await_all(self, slips: Sequence[Pending]) -> None:
        """Wait for what peers send and take. Who says nothing for too long is the master's to
        judge, which regroups the hosts without it."""
        for slip in slips:
            while not slip.done():
                if self._stop.is_set():
                    raise CalledOff
                try:
                    slip.wait(LOOK_SECONDS)
                except PeerTimeoutError:
                    if slip.ended:  # not this wait's time is up, but the connection's
                        raise
