"""Snapshot: a copy of the committed state, at most a few steps old, to roll back to.

Owners update parameters in place, so a worker that dies while it does so leaves a state in which
some blocks are a step ahead of others. Then the state is rolled back, and the steps since are
computed again, to the same bits. Each owner brings its part of the snapshot up to date at the end
of the steps that the agent has marked, before its next step: so nobody overwrites a state that the
snapshot does not hold whole, and its cost does not grow with the number of steps.

Checkpoints are written from the snapshot, too: while one is being written, no step is marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from lockstep.planning.byte_ranges import ByteRange, merge_ranges
from lockstep.state.control_segment import ControlSegment
from lockstep.system.shared_memory import Segment

COPY_BYTES_PER_SECOND = 4e9
"""About what a worker copies in a second, beside others."""
SHARE = 0.01
"""The part of their time that workers may spend on snapshots."""
PIECE_BYTES = 64 << 20
"""What is copied before it is written to a disk, if the snapshot lies on one."""
LEAST_SECONDS = 0.05
"""Between two copies: what a worker's death in the middle of an update costs at most."""


def steps_between(state_bytes: int, workers: int, steps_per_second: float) -> int:
    """How many steps the snapshot may be behind: as few as it costs little, 1 for long steps."""
    copying = state_bytes / workers / COPY_BYTES_PER_SECOND
    seconds = max(LEAST_SECONDS, copying / SHARE)
    return max(1, round(seconds * steps_per_second))


class SnapshotPart:
    """One worker's part of the snapshot: what it alone writes to."""

    def __init__(self, state: Segment, copy: Segment, ranges: Sequence[ByteRange]) -> None:
        # Slices of memoryviews are copied by memcpy: faster than a tensor's copy_, and shorter.
        live, copied = memoryview(state.map), memoryview(copy.map)
        runs = [slice(item.offset, item.offset + item.nbytes) for item in merge_ranges(ranges)]
        self._copies = [(copied[run], live[run]) for run in runs]

    def refresh(self) -> None:
        """Copy this worker's part of the committed state. Called between a commit and this
        worker's next meeting with the others."""
        for kept, live in self._copies:
            kept[:] = live


class Snapshot:
    """The agent's end: everything at once, while all workers rest."""

    def __init__(self, control: ControlSegment, state: Segment, copy: Segment) -> None:
        self.control, self.nbytes, self._segment = control, state.nbytes, copy
        self._state = memoryview(state.map)[: state.nbytes]
        self._copy = memoryview(copy.map)[: state.nbytes]

    def take(self, step: int, parts: Iterable[ByteRange] | None = None) -> memoryview:
        """Copy the state after `step` committed steps, or these parts of it; returns the copy."""
        self._put(parts, self._state)
        self.control.snapshot_step = step
        return self._copy

    def put(self, parts: Iterable[ByteRange], source: Segment) -> None:
        """Copy parts of the state from elsewhere, before the rest is taken."""
        for piece in self._pieces(parts):
            self._segment.write(piece.start, source.peek(piece.start, piece.stop - piece.start))
            source.settle(piece.start, piece.stop - piece.start)

    def _put(self, parts: Iterable[ByteRange] | None, source: memoryview) -> None:
        for piece in self._pieces(parts):
            self._segment.write(piece.start, source[piece])

    @property
    def view(self) -> memoryview:
        """The state after `control.snapshot_step` committed steps."""
        return self._copy

    def roll_back(self, parts: Iterable[ByteRange] | None = None) -> None:
        """Make the state, or these parts of it, that after `control.snapshot_step` steps again."""
        for piece in self._pieces(parts):
            self._segment.read(piece.start, self._state[piece])

    def _pieces(self, parts: Iterable[ByteRange] | None) -> Iterator[slice]:
        """What is copied at once: all, or what may be in memory of a file on a disk."""
        for run in self._runs(parts):
            most = PIECE_BYTES if self._segment.is_on_disk else self.nbytes or 1
            for start in range(run.start, run.stop, most):
                yield slice(start, min(start + most, run.stop))

    def _runs(self, parts: Iterable[ByteRange] | None) -> list[slice]:
        if parts is None:
            return [slice(0, self.nbytes)]
        return [slice(part.offset, part.offset + part.nbytes) for part in parts]

    def close(self) -> None:
        """Let go of the memory: what `take` returned cannot be read any more."""
        self._state.release()
        self._copy.release()
