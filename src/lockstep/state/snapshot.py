"""The base: a copy of the committed state, at most a few steps old, to go back to.

Owners update parameters in place, so a worker that dies while it does so leaves a state in which
some blocks are a step ahead of others. Then the base is put back, and the steps since are computed
again, to the same bits. Each owner brings its part of the base up to date at the end of the steps
that the master has marked, before it goes on: so nobody overwrites a state that the base does not
hold whole, and what the base costs does not grow with the number of steps.

Checkpoints are written from the base, too: while one is being written, no step is marked.
"""

from __future__ import annotations

from collections.abc import Sequence

from lockstep.planning.byte_ranges import ByteRange, merge_ranges
from lockstep.state.control_segment import ControlSegment
from lockstep.system.shared_memory import Segment

COPY_BYTES_PER_SECOND = 4e9
"""About what a worker copies in a second, beside others."""
SHARE = 0.01
"""The part of their time that workers may spend on the base."""
LEAST_SECONDS = 0.05
"""Between two copies: what a worker's death in the middle of an update costs at most."""


def steps_between(state_bytes: int, workers: int, steps_per_second: float) -> int:
    """How many steps the base may be behind: as few as its cost allows, and 1 for long steps."""
    copying = state_bytes / workers / COPY_BYTES_PER_SECOND
    seconds = max(LEAST_SECONDS, copying / SHARE)
    return max(1, round(seconds * steps_per_second))


class SnapshotPart:
    """One worker's part of the base: what it alone writes to."""

    def __init__(self, state: Segment, base: Segment, ranges: Sequence[ByteRange]) -> None:
        # Slices of memoryviews are copied by memcpy: faster than a tensor's copy_, and shorter.
        here, there = memoryview(state.map), memoryview(base.map)
        runs = [slice(item.offset, item.offset + item.nbytes) for item in merge_ranges(ranges)]
        self._copies = [(there[run], here[run]) for run in runs]

    def refresh(self) -> None:
        """Copy this worker's part of the committed state. Called between a commit and this
        worker's next meeting with the others."""
        for kept, live in self._copies:
            kept[:] = live


class Snapshot:
    """The master's end: everything at once, while all workers rest."""

    def __init__(self, control: ControlSegment, state: Segment, base: Segment) -> None:
        self.control, self.nbytes = control, state.nbytes
        self._state = memoryview(state.map)[: state.nbytes]
        self._base = memoryview(base.map)[: state.nbytes]

    def take(self, step: int) -> memoryview:
        """Copy the state after `step` committed steps; returns the copy."""
        self._base[:] = self._state
        self.control.snapshot_step = step
        return self._base

    @property
    def view(self) -> memoryview:
        """The base: the state after `control.snapshot_step` committed steps."""
        return self._base

    def roll_back(self) -> None:
        """Make the state what the base holds: that after `control.snapshot_step` steps."""
        self._state[:] = self._base

    def close(self) -> None:
        """Let go of the memory: what `take` returned cannot be read any more."""
        self._state.release()
        self._base.release()
