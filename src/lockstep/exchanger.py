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
from collections.abc import Callable, Iterator, Sequence

from lockstep import futex
from lockstep.control import RING, Control, Phase, progress_of
from lockstep.errors import NetworkError, PeerTimeoutError
from lockstep.exchange import Arrangement, HostPart, SlotMap, cut, leaf_slots
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
    DENSE = 4
    NUMBERS = 5
    ROWS = 6


def tag_of(field: Field, shard: int = 0, run: int = 0) -> int:
    """The tag of a field of a shard's slot."""
    return field << 28 | shard << 12 | run


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
    ) -> None:
        self.control, self.places, self.transport = control, places, transport
        self._slots, self._seats, self._failed = slots, seats, failed
        self.mine = arrangement.part(transport.node)
        self.others = arrangement.others(transport.node)
        self._leaves = leaf_slots(arrangement.subtrees, self.mine.shards, arrangement.shards)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.sent_bytes = 0
        """To all others together, without what carries it."""

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
        coming = [slip for other in self.others for slip in self._expect(step, other)]
        self._await_workers(progress_of(step, Phase.SUMMED))
        going = self._send_all(step)
        self._await_all(coming)
        if self.places.tables:
            rows = [slip for other in self.others for slip in self._expect_rows(step, other)]
            self._await_all(rows)
        self._await_all(going)
        self.control.exchanged = step + 1

    # What is sent, and where it belongs: the same on both sides.

    def _fixed(self, step: int, host: HostPart) -> Iterator[tuple[int, memoryview]]:
        """What every step has of a host's shards, by tag; its size is known beforehand."""
        control, shards = self.control, host.shards
        run = slice(shards.start, shards.stop)
        yield tag_of(Field.LOSSES), control.losses[step % RING, run].data.cast("B")
        yield tag_of(Field.FLAGS), control.has_grad[run].reshape(-1).data
        if self.places.buffers.nbytes:
            for shard in shards:
                yield tag_of(Field.BUFFERS, shard), self._view(shard, self.places.buffers)
        if self.places.tables:
            for tree in host.subtrees:
                for run_number, table in enumerate(self.places.tables):
                    count = Range(offset=table.numbers.offset, nbytes=8)
                    yield tag_of(Field.COUNTS, tree.start, run_number), self._leaf(tree, count)
        for tree in host.subtrees:
            pieces = itertools.chain.from_iterable(map(cut, self.places.dense))
            for run_number, piece in enumerate(pieces):
                yield tag_of(Field.DENSE, tree.start, run_number), self._leaf(tree, piece)

    def _rows(self, host: HostPart) -> Iterator[tuple[int, memoryview]]:
        """The rows of large tables that a host's subtrees have touched, once that is known."""
        for tree in host.subtrees:
            for number, table in enumerate(self.places.tables):
                start = table.numbers.offset
                word = self._leaf(tree, Range(offset=start, nbytes=8))
                (count,) = struct.unpack("=q", word)
                rows = table.home
                if count >= 0:
                    rows = Range(offset=rows.offset, nbytes=count * table.row_bytes)
                    named = Range(offset=start + 8, nbytes=8 * count)
                    if count:
                        yield tag_of(Field.NUMBERS, tree.start, number), self._leaf(tree, named)
                for place, piece in enumerate(cut(rows)):
                    tag = tag_of(Field.ROWS, tree.start, number << 6 | place)
                    yield tag, self._leaf(tree, piece)

    def _leaf(self, tree: range, item: Range) -> memoryview:
        """A run of the slot that has the subtree's sum."""
        return self._view(self._leaves[tree.start], item)

    def _view(self, slot: int, item: Range) -> memoryview:
        start = slot * self.places.nbytes + item.offset
        return self._slots[start : start + item.nbytes]

    # Going and coming.

    def _send_all(self, step: int) -> list[Pending]:
        going = []
        views = list(self._fixed(step, self.mine))
        if self.places.tables:
            views += self._rows(self.mine)
        for other in self.others:
            for tag, view in views:
                key = Key(Kind.PARTIAL, step, tag)
                going.append(self.transport.send(other.name, key, view))
                self.sent_bytes += view.nbytes
        return going

    def _expect(self, step: int, other: HostPart) -> list[Pending]:
        return [
            self.transport.expect(other.name, Key(Kind.PARTIAL, step, tag), view)
            for tag, view in self._fixed(step, other)
        ]

    def _expect_rows(self, step: int, other: HostPart) -> list[Pending]:
        return [
            self.transport.expect(other.name, Key(Kind.PARTIAL, step, tag), view)
            for tag, view in self._rows(other)
        ]

    # Waits: each ends when the hosts are regrouped.

    def _await_workers(self, progress: int) -> None:
        """Wait until every worker of this host has come so far, whoever they are."""
        control = self.control
        while True:
            behind = [
                (seat, word)
                for seat in self._seats()
                if (word := control.progress(seat)) < progress
            ]
            if self._stop.is_set():
                raise CalledOff
            if not behind and self._seats():
                return
            if behind:
                seat, word = behind[0]
                futex.wait(control.progress_address(seat), word, NAP)
            else:
                self._stop.wait(NAP)

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
                    continue
