"""Machine: the cores and the memory that this process may use (affinity, cgroups)."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from lockstep.errors import ResourceError
from lockstep.system import cgroup


def available_bytes() -> int:
    """Memory that can still be had: the machine's, or the control group's if that is less."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    left = cgroup.memory_left()
    return available if left is None else min(available, left)


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
        fix="use fewer shards (each needs one gradient), a smaller model, or a larger machine; or "
        "several hosts, of which each keeps some slices of the model (ownership: slices)",
    )


def cores() -> int:
    """The cores that this process may use: its affinity, and the control group's quota."""
    count = len(os.sched_getaffinity(0))
    limit = cgroup.core_limit()
    return count if limit is None else min(count, limit)


def cpu_model() -> str:
    """The processor's name, as the kernel has it; "" where it does not say."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return ""


def give_back_freed_memory() -> None:
    """Give the memory that this process has freed back to the kernel. Otherwise what was needed
    once, to build a state, is kept for good (decision 9). Without glibc nothing is done."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
