"""What a measuring fork says of its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lockstep.worker.job_measurement import COMPUTE, END, UPDATE, Board, private_kilobytes


def test_what_is_told_is_told_at_once() -> None:
    """Who reads while something else is told sees the one or the other, and no mixture."""
    board = Board()
    assert board.told() == (0, 0, 0)
    board.tell(COMPUTE, 1 << 30)
    assert board.told() == (1, COMPUTE, 1 << 30)
    pairs, seen = {(COMPUTE, 1 << 30), (UPDATE, 4)}, set()
    child = os.fork()
    if child == 0:
        for _ in range(200_000):
            board.tell(UPDATE, 4)
            board.tell(COMPUTE, 1 << 30)
        board.tell(END, 0)
        os._exit(0)
    while (told := board.told()[1:])[0] != END:
        seen.add(told)
    os.waitpid(child, 0)
    assert seen <= pairs


SMAPS = """\
55fb4bb31000-55fb4bb32000 r--p 00000000 fe:00 26723                      /usr/bin/python3.11
Size:                  4 kB
Private_Dirty:         7 kB
7f0000000000-7f0000400000 rw-s 00000000 00:01 2051                       /memfd:lockstep-state (deleted)
Private_Dirty:      4096 kB
7f0000400000-7f0000800000 rw-p 00000000 00:00 0
Shared_Dirty:       1000 kB
Private_Dirty:        20 kB
VmFlags: rd wr mr mw me ac
"""  # noqa: E501


def test_segments_of_the_run_are_not_a_workers_own(tmp_path: Path) -> None:
    (tmp_path / "smaps").write_text(SMAPS)
    assert private_kilobytes(tmp_path / "smaps") == 27
    assert private_kilobytes(tmp_path / "none") == 0


PROGRAM = """
import mmap, os
import torch
from lockstep.worker.job_measurement import private_bytes, reset_peak
fd = os.memfd_create("lockstep-x")
os.ftruncate(fd, 64 << 20)
before = private_bytes()
segment = mmap.mmap(fd, 64 << 20)
segment[:] = b"x" * (64 << 20)
reset_peak()
shared = private_bytes()
passing = torch.ones(48 << 18)
del passing
print((shared - before) >> 20, (private_bytes() - shared) >> 20)
"""


def test_what_is_given_back_counts_and_what_is_shared_does_not() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60
    )
    shared, passing = map(int, done.stdout.split())
    assert shared < 16
    assert 40 <= passing < 64
