"""Shared memory, and the base in it."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from lockstep.errors import ResourceError
from lockstep.planning.byte_ranges import ByteRange
from lockstep.state.control_segment import ControlSegment, ControlShape
from lockstep.state.snapshot import Snapshot, SnapshotPart, steps_between
from lockstep.system import machine
from lockstep.system.shared_memory import Segment

# Memory.


def test_segment_holds_what_is_written() -> None:
    segment = Segment.create("state", 10_000)
    try:
        assert len(segment) == 10_000
        assert segment.map[:10_000] == bytes(10_000)
        segment.map[9_999:10_000] = b"x"
        other = Segment(os.dup(segment.fd), 10_000)
        assert other.map[9_999:10_000] == b"x"
        other.close()
    finally:
        segment.close()


def test_an_empty_segment_can_be_mapped() -> None:
    Segment.create("slots", 0).close()


def test_a_segment_may_be_closed_under_a_view() -> None:
    segment = Segment.create("state", 64)
    view = np.frombuffer(segment.map, np.uint8)
    segment.close()
    assert int(view.sum()) == 0


def test_a_segment_larger_than_the_memory_is_refused() -> None:
    nbytes = 2 * machine.available_bytes() + 2**40
    with pytest.raises(ResourceError, match="not enough memory for the slots segment") as caught:
        Segment.create("slots", nbytes)
    assert f"{nbytes / 2**20:,.0f} MiB" in caught.value.expected
    assert "available" in caught.value.found


def test_a_shortage_at_allocation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixture that counts descriptors sees that none stays open."""

    def none_left(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, "posix_fallocate", none_left)
    with pytest.raises(ResourceError, match="state segment"):
        Segment.create("state", 4096)


# The base.


def test_the_base_is_copied_part_by_part_and_put_back() -> None:
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


def test_the_base_is_as_young_as_its_cost_allows() -> None:
    assert steps_between(10 << 20, 2, steps_per_second=0.0) == 1
    assert steps_between(10 << 20, 2, steps_per_second=1.0) == 1, "long steps: after each"
    assert steps_between(1 << 10, 2, steps_per_second=1000.0) == 50
    large = steps_between(8 << 30, 1, steps_per_second=10.0)
    assert steps_between(8 << 30, 4, steps_per_second=10.0) == pytest.approx(large / 4, abs=1)
