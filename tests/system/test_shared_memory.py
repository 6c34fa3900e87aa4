"""Shared memory: segments that leave nothing behind, and shortages that are refused."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from lockstep.errors import ResourceError
from lockstep.system import machine
from lockstep.system.shared_memory import Segment


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


def test_nothing_is_allocated_at_somebody_elses_word() -> None:
    """What another host has announced takes memory as it comes."""
    size, piece = 1 << 29, 4 << 20
    segment = Segment.create("data", size, at_once=False)
    try:
        assert len(segment) == size
        assert os.fstat(segment.fd).st_blocks == 0
        segment.reserve(piece, piece)
        assert os.fstat(segment.fd).st_blocks * 512 == piece
        segment.map[piece : piece + 3] = b"abc"
        assert segment.map[piece : piece + 4] == b"abc\0"
    finally:
        segment.close()


def test_a_part_is_released_reserved_and_read_without_taking_memory() -> None:
    size = 64 * mmap.PAGESIZE
    segment = Segment.create("state", size, at_once=False)
    assert segment.resident_bytes == 0
    assert list(segment.written()) == []
    segment.map[:size] = b"x" * size
    assert list(segment.written()) == [(0, size)]
    segment.release(10, 9 * mmap.PAGESIZE)
    assert segment.resident_bytes == size - 8 * mmap.PAGESIZE, "whole pages go"
    assert list(segment.written()) == [(0, mmap.PAGESIZE), (9 * mmap.PAGESIZE, size)]
    assert segment.peek(0, mmap.PAGESIZE + 2) == b"x" * mmap.PAGESIZE + bytes(2)
    assert segment.resident_bytes == size - 8 * mmap.PAGESIZE, "reading takes none"
    segment.reserve(0, size)
    assert segment.resident_bytes == size
    segment.close()


def test_a_segment_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    segment = Segment.on_disk("snapshot", 3 * mmap.PAGESIZE)
    assert segment.is_on_disk
    assert not list(tmp_path.iterdir()), "it has no name"
    segment.write(100, b"abc")
    found = bytearray(5)
    segment.read(99, memoryview(found))
    assert found == b"\0abc\0"
    assert segment.map[100:103] == b"abc"
    segment.map[100:103] = b"xyz"
    segment.settle(100, 3)
    assert segment.peek(100, 3) == b"xyz"
    segment.close()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ResourceError, match="cannot be put on a disk") as caught:
        Segment.on_disk("snapshot", 1)
    assert "TMPDIR" in caught.value.fix
