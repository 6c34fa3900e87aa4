"""The memory that a process uses."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import ctypes, os
from lockstep.system.machine import give_back_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
runs = [libc.malloc(ctypes.c_size_t(1 << 20)) for _ in range(100)]
for run in runs:
    ctypes.memset(run, 1, 1 << 20)
for run in runs:
    libc.free(ctypes.c_void_p(run))
before = resident()
give_back_freed_memory()
print(before, resident())
"""


def test_freed_memory_is_given_back() -> None:
    """Also where malloc is told to keep it, as in a forkserver."""
    keep = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **keep}, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    before, after = map(int, done.stdout.split())
    assert before > 100
    assert after < before - 90
