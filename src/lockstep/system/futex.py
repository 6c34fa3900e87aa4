"""Waiting on a 32-bit word in shared memory, in the kernel: Linux futexes through libc.

Where there is no futex the wait is a short poll; the callers' loops are the same.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import time

_NUMBERS = {"x86_64": 202, "aarch64": 98, "ppc64le": 221, "s390x": 238, "riscv64": 98}
_WAIT, _WAKE, _ALL = 0, 1, 2**31 - 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_NUMBER = _NUMBERS.get(platform.machine()) if sys.platform == "linux" else None
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_POLL = 0.0002


def available() -> bool:
    """Whether waits here are futex waits."""
    return _NUMBER is not None


def wait(address: int, value: int, seconds: float) -> None:
    """Sleep while the word at `address` is `value`, for `seconds` at the most.

    Returns early at a wake, a signal, or for no reason: the caller looks at the word again.
    """
    if _NUMBER is None:
        time.sleep(min(seconds, _POLL))
        return
    limit = _Timespec(int(seconds), int(seconds % 1 * 1e9))
    _syscall(
        _NUMBER, ctypes.c_void_p(address), _WAIT, ctypes.c_uint32(value & 0xFFFFFFFF),
        ctypes.byref(limit), None, 0,
    )  # fmt: skip


def wake(address: int) -> None:
    """Wake every process that waits on the word at `address`."""
    if _NUMBER is not None:
        _syscall(_NUMBER, ctypes.c_void_p(address), _WAKE, _ALL, None, None, 0)
