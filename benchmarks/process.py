"""Bounded subprocesses that leave nothing behind, their memory, and the state of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_PR_SET_CHILD_SUBREAPER = 36
_SETTLE = 3.0
"""Seconds that processes have to end by themselves once their starter has ended."""


class ContenderFailed(RuntimeError):
    """A measured process failed, or did not end in time."""


def adopt_orphans() -> None:
    """Make this process the parent of orphaned descendants, so that `clear` can find them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """All living processes below `pid`, by /proc; zombies are left out."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            stat = Path(entry.path, "stat").read_text()
        except OSError:
            continue
        state, parent = stat[stat.rindex(")") + 2 :].split()[:2]
        if state not in "ZX":
            children.setdefault(int(parent), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def clear(before: set[int]) -> int:
    """Wait for the processes below this one to end, then kill the rest; returns how many.

    Those in `before` are another's business.
    """
    until = time.monotonic() + _SETTLE
    while (left := set(descendants(os.getpid())) - before) and time.monotonic() < until:
        time.sleep(0.02)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(left)


def environment() -> dict[str, str]:
    """This process's environment, with the repository importable by everything started."""
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A command that ended with status 0."""

    output: str
    orphans: int
    """Processes that it left running, and that were killed."""

    def json(self) -> Any:
        """The last line of the output, decoded."""
        return json.loads(self.output.splitlines()[-1])


def finish(
    command: list[str],
    *,
    timeout: float,
    python: str = sys.executable,
    watch: Callable[[int, str], bool] | None = None,
    every: float = 0.1,
) -> Finished:
    """Run `command` with this Python, or another, to its end, within `timeout` seconds.

    `watch(pid, output so far)` is called `every` seconds; once it returns False the command is
    ended by SIGTERM, and its status does not count. Raises `ContenderFailed`; in every case no
    process that the command started is left.
    """
    stopped, code = False, None
    before = set(descendants(os.getpid()))
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        tempfile.TemporaryDirectory(prefix="lockstep-bench-") as scratch,
    ):
        process = subprocess.Popen(
            [python, *command], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            cwd=ROOT, env=environment() | {"TMPDIR": scratch},
        )  # fmt: skip
        until = time.monotonic() + timeout
        try:
            while code is None and time.monotonic() < until:
                try:
                    left = max(0.0, until - time.monotonic())
                    code = process.wait(left if watch is None else min(every, left))
                except subprocess.TimeoutExpired:
                    if watch and not stopped and not watch(process.pid, _text(out)):
                        stopped = True
                        process.terminate()
                        until = min(until, time.monotonic() + 10)
        finally:
            if code is None:
                for pid in [process.pid, *descendants(process.pid)]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait(10)
            orphans = clear(before)
        if code != 0 and not stopped:
            how = f"no end after {timeout:.0f} s" if code is None else f"status {code}"
            raise ContenderFailed(f"{' '.join(command)}: {how}\n{_text(err).strip()[-800:]}")
        return Finished(output=_text(out), orphans=orphans)


def _text(file: Any) -> str:
    """All that a child has written so far; leaves the shared offset where the child has it."""
    return os.pread(file.fileno(), 1 << 24, 0).decode(errors="replace")


def pss(pids: list[int]) -> int | None:
    """Bytes of memory of these processes together, shared pages counted once; None: one ended.

    Exact when the pages are shared among them alone, as PSS divides a page by all its users.
    """
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            return None
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, memory, versions. `boot`: which machine it is;
    two of one kind differ too."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    wide = [f for f in ("avx2", "avx512f", "amx_tile") if f in _flags()]
    return {
        "processor": f"{model} ({', '.join(wide) or 'no AVX2'})",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text()[:8],
    }


def _flags() -> list[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return line.split()
    return []


def load() -> float:
    """Mean number of runnable processes over the last minute."""
    return os.getloadavg()[0]


def cpu_times() -> dict[str, int]:
    """Ticks since the start of the machine: all together, idle, and stolen by the hypervisor."""
    ticks = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return {"all": sum(ticks), "idle": ticks[3] + ticks[4], "steal": ticks[7]}


def share(before: Mapping[str, int], after: Mapping[str, int], kind: str) -> float:
    """The share of all processor time between two `cpu_times` that was `kind`."""
    whole = after["all"] - before["all"]
    return (after[kind] - before[kind]) / whole if whole else 0.0
