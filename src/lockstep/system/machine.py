"""Machine: the cores and the memory that this process may use (affinity, cgroups)."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from lockstep.errors import ResourceError


def available_bytes() -> int:
    """Memory that can still be had: the machine's, or the control group's if that is less."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        text = limit.read_text().strip()
        if text != "max":
            available = min(available, int(text) - int(used.read_text()))
    except (OSError, ValueError):
        pass  # no cgroup v2 here, or no limit
    return available


def check_available(what: str, nbytes: int) -> None:
    """Raise `ResourceError` unless `nbytes` more can be had for `what`."""
    available = available_bytes()
    if nbytes > available:
        raise not_enough_memory(what, nbytes, available)


def not_enough_memory(what: str, nbytes: int, available: int) -> ResourceError:
    """What to raise where `nbytes` for `what` cannot be had."""
    return ResourceError(
        f"not enough memory for {what}",
        expected=f"{nbytes / 2**20:,.0f} MiB",
        found=f"{available / 2**20:,.0f} MiB available",
        fix="use fewer shards (each needs one gradient), a smaller model, or a larger machine",
    )


def cores() -> int:
    """The cores that this process may use: its affinity, and the control group's quota."""
    count = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2 here
    return count


def give_back_freed_memory() -> None:
    """Give the memory that this process has freed back to the kernel. Otherwise what was needed
    once, to build a state, is kept for good (decision 9). Without glibc nothing is done."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
