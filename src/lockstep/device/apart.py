"""Apart device: each worker computes on the CPU, in memory that nobody else sees.

It is a GPU as far as moves are concerned: what is not stored reaches nobody, what is not loaded is
not there. All of it is done at `settle` and no sooner, so that where one is missing the results are
other ones, on any machine. It computes the same bits as workers in shared memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import torch
from blake3 import blake3

from lockstep.device.device import SegmentName
from lockstep.device.shared import SharedDevice
from lockstep.planning.byte_ranges import ByteRange
from lockstep.state.control_segment import DIGEST_BYTES
from lockstep.state.private_state import private_state
from lockstep.state.shared_state import SharedState
from lockstep.system.machine import check_available

Copy = tuple[memoryview, memoryview]
"""Where to, where from."""


class ApartDevice(SharedDevice):
    """The CPU, for workers with memory of their own."""

    apart = True

    def __init__(self) -> None:
        super().__init__()
        self._loads: list[Copy] = []
        self._stores: list[Copy] = []
        self._homes: dict[SegmentName, memoryview] = {}
        self._segments: dict[SegmentName, memoryview] = {}

    def home(self, shared: SharedState) -> SharedState:
        names: tuple[SegmentName, ...] = ("state", "slots")
        memory: dict[SegmentName, torch.Tensor] = {}
        for name in names:
            segment = shared.segments[name]
            check_available(f"a worker's own {name}", segment.nbytes)
            # As the segments are: on a page, and zeros where nothing has been written.
            room = mmap.mmap(-1, len(segment.map), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._homes[name], self._segments[name] = memoryview(room), memoryview(segment.map)
            memory[name] = torch.frombuffer(room, dtype=torch.uint8)
        return private_state(shared, memory["state"], memory["slots"])

    def load(self, segment: SegmentName, ranges: Iterable[ByteRange]) -> None:
        self._loads += _copies(self._homes[segment], self._segments[segment], ranges)

    def store(self, segment: SegmentName, ranges: Iterable[ByteRange]) -> None:
        self._stores += _copies(self._segments[segment], self._homes[segment], ranges)

    def settle(self) -> None:
        # Loads first: of two workers that have forgotten to settle what they stored, one at least
        # gets what is old, whoever is quicker.
        queue, self._loads, self._stores = self._loads + self._stores, [], []
        for target, source in queue:
            target[:] = source
            self.moved += len(source)

    def digest(self, offset: int, nbytes: int) -> bytes:
        return blake3(self._homes["state"][offset : offset + nbytes]).digest(DIGEST_BYTES)


def _copies(target: memoryview, source: memoryview, ranges: Iterable[ByteRange]) -> list[Copy]:
    runs = (slice(item.offset, item.offset + item.nbytes) for item in ranges)
    return [(target[run], source[run]) for run in runs]
