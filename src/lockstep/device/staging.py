"""Staging: runs of bytes on their way between a GPU's memory and a segment, in pinned memory.

A copy to or from pinned memory is queued on the GPU's stream behind the kernels before it; one of
pageable memory, as a segment is, would stop the worker for each run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

ROOM = 32 << 20
"""Bytes of pinned memory, about what a step of a small model moves at once."""


class Staging:
    """One worker's. `synchronize` returns when the stream has done all that was queued."""

    def __init__(self, room: torch.Tensor, synchronize: Callable[[], None]) -> None:
        """`room`: bytes, pinned where there is a GPU."""
        self._room, self._synchronize = room, synchronize
        self._used = 0
        self._arriving: list[tuple[memoryview, memoryview]] = []
        """Where to, and where in the room."""

    def to_device(self, target: torch.Tensor, source: memoryview) -> None:
        """Queue the copy of a segment's run to the device. The source is read now."""
        for start, stop in self._pieces(len(source)):
            room, view = self._take(stop - start)
            view[:] = source[start:stop]
            target[start:stop].copy_(room, non_blocking=True)

    def to_segment(self, target: memoryview, source: torch.Tensor) -> None:
        """Queue the copy of a run of the device's memory to a segment, which has it by `settle`."""
        for start, stop in self._pieces(len(target)):
            room, view = self._take(stop - start)
            room.copy_(source[start:stop], non_blocking=True)
            self._arriving.append((target[start:stop], view))

    def settle(self) -> None:
        """Do all that was asked for."""
        self._synchronize()
        arriving, self._arriving, self._used = self._arriving, [], 0
        for target, view in arriving:
            target[:] = view

    def _pieces(self, nbytes: int) -> list[tuple[int, int]]:
        size = len(self._room)
        return [(start, min(start + size, nbytes)) for start in range(0, nbytes, size)]

    def _take(self, nbytes: int) -> tuple[torch.Tensor, memoryview]:
        """So many bytes of the room; where there are none left, what is queued is done first."""
        if self._used + nbytes > len(self._room):
            self.settle()
        room = self._room[self._used : self._used + nbytes]
        self._used += nbytes
        view: memoryview = room.numpy().data
        return room, view
