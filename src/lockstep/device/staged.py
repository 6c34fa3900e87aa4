"""Staged device: homes in the memory of a torch device, moved through pinned memory on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from blake3 import blake3

from lockstep.device.device import SegmentName
from lockstep.device.placement import place
from lockstep.device.shared import SharedDevice
from lockstep.device.staging import Staging
from lockstep.planning.byte_ranges import ByteRange
from lockstep.state.control_segment import DIGEST_BYTES
from lockstep.state.private_state import private_state
from lockstep.state.shared_state import SharedState


class StagedDevice(SharedDevice):
    """Any device of torch. With the CPU it is a test of what `cuda` shares with it."""

    apart = True

    def __init__(
        self, where: torch.device, room: torch.Tensor, synchronize: Callable[[], None]
    ) -> None:
        """`room`: bytes for what is on its way; `synchronize` returns when the device has done all
        that was queued."""
        super().__init__()
        self.where = where
        self._staging = Staging(room, synchronize)
        self._homes: dict[SegmentName, torch.Tensor] = {}
        self._segments: dict[SegmentName, memoryview] = {}

    def home(self, shared: SharedState) -> SharedState:
        names: tuple[SegmentName, ...] = ("state", "slots")
        for name in names:
            segment = memoryview(shared.segments[name].map)
            self._segments[name] = segment
            self._homes[name] = torch.zeros(len(segment), dtype=torch.uint8, device=self.where)
        for _, own in shared.buffers:
            own.data = own.data.to(self.where)
        return private_state(shared, self._homes["state"], self._homes["slots"])

    def load(self, segment: SegmentName, ranges: Iterable[ByteRange]) -> None:
        home, shared = self._homes[segment], self._segments[segment]
        for run in _runs(ranges):
            self._staging.to_device(home[run], shared[run])
            self.moved += run.stop - run.start

    def store(self, segment: SegmentName, ranges: Iterable[ByteRange]) -> None:
        home, shared = self._homes[segment], self._segments[segment]
        for run in _runs(ranges):
            self._staging.to_segment(shared[run], home[run])
            self.moved += run.stop - run.start

    def settle(self) -> None:
        self._staging.settle()

    def place(self, batch: Any) -> Any:
        return place(batch, self.where)

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.where.type, torch.bfloat16)

    def digest(self, offset: int, nbytes: int) -> bytes:
        run = self._homes["state"][offset : offset + nbytes]
        return blake3(run.cpu().numpy().data).digest(DIGEST_BYTES)


def _runs(ranges: Iterable[ByteRange]) -> list[slice]:
    return [slice(item.offset, item.offset + item.nbytes) for item in ranges]
