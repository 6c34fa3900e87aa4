"""Host memory: the mapped segments of a host that is set up, and what lies in them.

The forkserver allocates the segments; agent and workers map the same pages. Whoever holds one of
these can read the whole state without the model, and without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.planning.forkserver_messages import StateReady
from lockstep.planning.memory_layout import Layout
from lockstep.planning.plan import Plan
from lockstep.planning.slot_map import SlotMap
from lockstep.state.control_segment import ControlSegment, ControlShape
from lockstep.state.snapshot import Snapshot
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

    @staticmethod
    def of(plan: Plan, ready: StateReady, fds: Sequence[int]) -> HostMemory:
        """Map what the forkserver has allocated: its answer, and the four descriptors with it."""
        state, copy, control_words, slots = (
            Segment(fd, nbytes) for fd, nbytes in zip(fds, ready.segment_bytes, strict=True)
        )
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
        )

    def close(self) -> None:
        """Unmap everything."""
        self.snapshot.close()
        self.control.close()
        for segment in (self.state, self.copy, self.slots):
            segment.close()
