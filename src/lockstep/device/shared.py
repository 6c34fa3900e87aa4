"""Shared device: homes that are the host's segments, so that nothing has to be moved."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from blake3 import blake3

from lockstep.device.device import SegmentName
from lockstep.planning.byte_ranges import ByteRange
from lockstep.state.control_segment import DIGEST_BYTES
from lockstep.state.shared_state import SharedState
from lockstep.system import numerics
from lockstep.system.seeding import seed_everything


class SharedDevice:
    """The CPU, for workers that all compute in the same memory."""

    apart = False

    def __init__(self) -> None:
        self.moved = 0
        self._state = memoryview(b"")

    def home(self, shared: SharedState) -> SharedState:
        self._state = memoryview(shared.segments["state"].map)
        return shared

    def load(self, segment: SegmentName, ranges: Iterable[ByteRange]) -> None:
        pass

    def store(self, segment: SegmentName, ranges: Iterable[ByteRange]) -> None:
        pass

    def settle(self) -> None:
        pass

    def place(self, batch: Any) -> Any:
        return batch

    def seed(self, seed: int) -> None:
        seed_everything(seed)

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16)

    def confirm(self, step: int, shard: int) -> None:
        pass

    def digest(self, offset: int, nbytes: int) -> bytes:
        return blake3(self._state[offset : offset + nbytes]).digest(DIGEST_BYTES)

    def profile(self) -> dict[str, Any]:
        return {}

    def probe(self) -> str:
        return numerics.probe()
