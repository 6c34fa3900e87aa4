"""Host memory: the mapped segments of a host that is set up, and what lies in them.

The forkserver allocates the segments; agent and workers map the same pages. Whoever holds one of
these can read the whole state without the model, and without torch.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.planning.byte_ranges import ByteRange, complement
from lockstep.planning.forkserver_messages import StateReady
from lockstep.planning.memory_layout import Layout
from lockstep.planning.plan import Plan
from lockstep.planning.slot_map import SlotMap
from lockstep.slices.board_memory import LINE, BoardMemory
from lockstep.state.control_segment import ControlSegment, ControlShape
from lockstep.state.snapshot import Snapshot
from lockstep.system.machine import check_available
from lockstep.system.shared_memory import Segment


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """The memory of one host's part in a job. Close it when nobody reads it any more."""

    layout: Layout
    slot_map: SlotMap
    profile: Mapping[str, Any]
    """The numerics profile of the process that allocated it."""
    state: Segment
    """Parameters, buffers, optimizer state."""
    slots: Segment
    """One gradient slot and one buffer slot per shard."""
    copy: Segment
    """Where the snapshot is kept."""
    control: ControlSegment
    snapshot: Snapshot
    scheduler_metric: str
    """The held-out metric that the task's schedule waits for; "": it does not wait."""
    cuts: tuple[Mapping[str, Any], ...] = ()
    """What became of each module with matrices, where they are cut into slices."""
    boards: BoardMemory | None = None
    """Where workers compute shards together with those of other hosts."""

    @staticmethod
    def of(plan: Plan, ready: StateReady, fds: Sequence[int]) -> HostMemory:
        """Map what the forkserver has allocated: its answer, and the four descriptors with it."""
        state, copy, control_words, slots = (
            Segment(fd, nbytes) for fd, nbytes in zip(fds, ready.segment_bytes, strict=False)
        )
        boards: BoardMemory | None = None
        if len(fds) > len(ready.segment_bytes):
            words, *buffers = fds[len(ready.segment_bytes) :]
            boards = BoardMemory.of(Segment(words, len(buffers) // 2 * LINE), buffers)
        control = ControlSegment(control_words, ControlShape.of(plan, ready.layout))
        return HostMemory(
            layout=ready.layout,
            slot_map=ready.slot_map,
            profile=json.loads(ready.profile),
            state=state,
            slots=slots,
            copy=copy,
            control=control,
            snapshot=Snapshot(control, state, copy),
            scheduler_metric=ready.scheduler_metric,
            cuts=tuple(json.loads(ready.cuts)),
            boards=boards,
        )

    @functools.cached_property
    def gathered(self) -> Segment:
        """Where parts of other hosts are put together, on a disk: this host has no room for them in
        its state, and what is half there must not be taken for a snapshot.

        Raises:
            ResourceError: there is no room on the disk.
        """
        return Segment.on_disk("gathered state", self.state.nbytes)

    def written(self) -> list[ByteRange]:
        """The parts of the state that are not just zeros that nobody has written."""
        return [ByteRange(offset=start, nbytes=end - start) for start, end in self.state.written()]

    def keep(self, needed: Sequence[ByteRange], absent: Container[int], slots: int) -> None:
        """Have memory for these parts of the state alone, and for gradients in so many slots, but
        those of `absent` parameters.

        Raises:
            ResourceError: there is not that much memory.
        """
        others = complement(self.state.nbytes, needed)
        grads = [run for param, run in self.slot_map.grads.items() if param in absent]
        for run in others:
            self.state.release(run.offset, run.nbytes)
        size = self.slot_map.nbytes
        for start, run in itertools.product(range(0, self.slots.nbytes, size), grads):
            self.slots.release(start + run.offset, run.nbytes)
        own = complement(size, grads)
        wanted = sum(run.nbytes for run in needed) + slots * sum(run.nbytes for run in own)
        there = self.state.resident_bytes + self.slots.resident_bytes
        check_available("this host's part of the state, and its gradients", wanted - there)
        for run in needed:
            self.state.reserve(run.offset, run.nbytes)
        for start, run in itertools.product(range(0, slots * size, size), own):
            self.slots.reserve(start + run.offset, run.nbytes)

    def close(self) -> None:
        """Unmap everything."""
        if self.boards is not None:
            self.boards.close()
        self.snapshot.close()
        self.control.close()
        gathered = [self.gathered] if "gathered" in self.__dict__ else []
        for segment in (self.state, self.copy, self.slots, *gathered):
            segment.close()
