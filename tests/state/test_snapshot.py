"""Snapshot: refreshed part by part, rolled back to, and as recent as its cost allows."""

from __future__ import annotations

import pytest

from lockstep.planning.byte_ranges import ByteRange
from lockstep.state.control_segment import ControlSegment, ControlShape
from lockstep.state.snapshot import Snapshot, SnapshotPart, steps_between
from lockstep.system.shared_memory import Segment


def test_the_snapshot_is_refreshed_in_parts_and_rolled_back_to() -> None:
    shape = ControlShape(shards=1, max_workers=1, params=1)
    control = ControlSegment(Segment.create("control", shape.nbytes()), shape)
    state, kept = Segment.create("state", 8192), Segment.create("base", 8192)
    base = Snapshot(control, state, kept)
    first, second = bytes(range(256)) * 32, bytes(range(255, -1, -1)) * 32
    state.map[:8192] = first
    assert bytes(base.take(3)) == first
    part = SnapshotPart(
        state, kept, [ByteRange(offset=256, nbytes=400), ByteRange(offset=1024, nbytes=1)]
    )
    state.map[:8192] = second
    part.refresh()
    base.roll_back()
    assert control.snapshot_step == 3
    mixed = bytearray(first)
    mixed[256:656], mixed[1024:1025] = second[256:656], second[1024:1025]
    assert state.map[:8192] == mixed
    base.close()
    del part
    control.close()
    state.close()
    kept.close()


def test_parts_of_a_snapshot_on_a_disk() -> None:
    """A host takes its own part and those of others, and goes back to its own."""
    shape = ControlShape(shards=1, max_workers=1, params=1)
    control = ControlSegment(Segment.create("control", shape.nbytes()), shape)
    state, gathered = Segment.create("state", 8192), Segment.on_disk("gathered", 8192)
    kept = Segment.on_disk("snapshot", 8192)
    snapshot = Snapshot(control, state, kept)
    own, others = ByteRange(offset=0, nbytes=5000), ByteRange(offset=5000, nbytes=3192)
    state.map[:8192], gathered.map[:8192] = b"a" * 8192, b"b" * 8192
    snapshot.put([others], gathered)
    assert bytes(snapshot.take(4, [own])) == b"a" * 5000 + b"b" * 3192
    state.map[:8192] = b"c" * 8192
    snapshot.roll_back([own])
    assert state.map[:8192] == b"a" * 5000 + b"c" * 3192
    snapshot.roll_back()
    assert state.map[:8192] == b"a" * 5000 + b"b" * 3192
    snapshot.close()
    for segment in (control, state, kept, gathered):
        segment.close()


def test_the_snapshot_is_as_recent_as_its_cost_allows() -> None:
    assert steps_between(10 << 20, 2, steps_per_second=0.0) == 1
    assert steps_between(10 << 20, 2, steps_per_second=1.0) == 1, "long steps: after each"
    assert steps_between(1 << 10, 2, steps_per_second=1000.0) == 50
    large = steps_between(8 << 30, 1, steps_per_second=10.0)
    assert steps_between(8 << 30, 4, steps_per_second=10.0) == pytest.approx(large / 4, abs=1)
