"""The undo log: what an owner is about to overwrite, kept until it has been overwritten whole.

Each seat has one log. Before a worker updates a group of blocks it copies their bytes of the state
segment here and marks the log valid; when the group is done it marks it empty. So whoever finds a
valid log of a dead worker can put the bytes back, and the group can be updated again from the
gradients, which stay in their slots until the step has committed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lockstep.layout import ALIGN, Block
from lockstep.memory import Segment

GROUP = 1 << 17
"""Elements: blocks are updated in groups of about this size, which stay in the cache."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """A run of bytes of the state segment."""

    offset: int
    nbytes: int


def merge_ranges(ranges: Sequence[Range]) -> list[Range]:
    """Sort and join ranges that touch, or that only a tensor's padding separates."""
    merged: list[Range] = []
    for item in sorted(ranges, key=lambda r: r.offset):
        if merged:
            end = merged[-1].offset + merged[-1].nbytes
            if item.offset in (end, math.ceil(end / ALIGN) * ALIGN):
                last = merged.pop()
                item = Range(offset=last.offset, nbytes=item.offset + item.nbytes - last.offset)
        merged.append(item)
    return merged


def group_blocks(blocks: Sequence[Block], numbers: Sequence[int]) -> list[list[int]]:
    """Cut an owner's run of blocks into groups of at most `GROUP` elements, or one block."""
    groups: list[list[int]] = []
    size = 0
    for number in numbers:
        if not groups or size + blocks[number].size > GROUP:
            groups.append([])
            size = 0
        groups[-1].append(number)
        size += blocks[number].size
    return groups


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The room that one log needs."""

    ranges: int
    blocks: int
    nbytes: int

    @property
    def total(self) -> int:
        return self.header + self.nbytes

    @property
    def header(self) -> int:
        """Bytes before the data: a valid mark, a count, the first and the last block, the ranges,
        and which step each block was at."""
        return math.ceil((4 + 2 * self.ranges + self.blocks) * 8 / ALIGN) * ALIGN


def needed_capacity(blocks: Sequence[Block], tensors: Sequence[Sequence[int]]) -> Capacity:
    """The largest log that any group of consecutive blocks can need.

    `tensors` gives, per block, the bytes of each tensor that its update changes.
    """
    ranges = numbers = nbytes = 0
    for first in range(len(blocks)):
        size = count = total = 0
        for number in range(first, len(blocks)):
            if number > first and size + blocks[number].size > GROUP:
                break
            size += blocks[number].size
            count += len(tensors[number])
            total += sum(tensors[number]) + ALIGN * len(tensors[number])
            numbers = max(numbers, number - first + 1)
        ranges, nbytes = max(ranges, count), max(nbytes, total)
    return Capacity(ranges=ranges, blocks=numbers, nbytes=math.ceil(nbytes / ALIGN) * ALIGN)


class UndoLog:
    """The logs of all seats, in one segment."""

    def __init__(self, segment: Segment, capacity: Capacity) -> None:
        self.segment, self.capacity = segment, capacity

    def _header(self, seat: int) -> npt.NDArray[np.int64]:
        count = self.capacity.header // 8
        start = seat * self.capacity.total
        return np.frombuffer(self.segment.map, np.int64, count=count, offset=start)

    def _data_start(self, seat: int) -> int:
        return seat * self.capacity.total + self.capacity.header

    def restore(self, seat: int, state: Segment, block_done: npt.NDArray[np.int32]) -> bool:
        """Put back what a dead worker was overwriting, and forget it; whether there was anything.

        Called by the master once the worker is dead, before its seat is taken again. Nobody else
        writes to these bytes. A group whose blocks are all marked done is whole: it stays.
        Otherwise the marks are put back too, since the worker may have died between two of them.
        """
        header = self._header(seat)
        valid, ranges, first, last = (int(value) for value in header[:4])
        header[0] = 0
        if valid == 0 or block_done[first : last + 1].min() >= valid - 1:
            return False
        marks = 4 + 2 * self.capacity.ranges
        block_done[first : last + 1] = header[marks : marks + last + 1 - first]
        cursor = self._data_start(seat)
        for index in range(ranges):
            offset, nbytes = int(header[4 + 2 * index]), int(header[5 + 2 * index])
            state.map[offset : offset + nbytes] = self.segment.map[cursor : cursor + nbytes]
            cursor += nbytes
        return True


class UndoWriter:
    """One worker's log. It saves one group at a time."""

    def __init__(
        self, log: UndoLog, seat: int, state: torch.Tensor, block_done: npt.NDArray[np.int32]
    ) -> None:
        self._done, self._marks = block_done, 4 + 2 * log.capacity.ranges
        self._header = log._header(seat)
        self._valid = self._header.data
        self._header[0] = 0
        start = log._data_start(seat)
        room = torch.frombuffer(
            log.segment.map, dtype=torch.uint8, count=log.capacity.nbytes, offset=start
        )
        self._room, self._state = room, state
        self._ranges: Sequence[Range] = ()
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def save(self, ranges: Sequence[Range], first: int, last: int, step: int) -> None:
        """Copy the ranges and mark the log valid. `ranges` is compared by identity.

        `first` and `last` are the numbers of the group's first and last block.
        """
        if ranges is not self._ranges:
            self._point_to(ranges)
            self._header[2:4] = first, last
        marks = self._marks
        self._header[marks : marks + last + 1 - first] = self._done[first : last + 1]
        for kept, live in self._copies:
            kept.copy_(live)
        self._valid[0] = step + 1

    def clear(self) -> None:
        """Mark the log empty: the group has been updated whole."""
        self._valid[0] = 0

    def _point_to(self, ranges: Sequence[Range]) -> None:
        self._ranges, self._copies = ranges, []
        self._header[1] = len(ranges)
        cursor = 0
        for index, item in enumerate(ranges):
            self._header[4 + 2 * index : 6 + 2 * index] = (item.offset, item.nbytes)
            kept = self._room[cursor : cursor + item.nbytes]
            self._copies.append((kept, self._state[item.offset : item.offset + item.nbytes]))
            cursor += item.nbytes
