"""Control groups: the limits of memory and cores that a container or a service puts on us.

Both versions count, the process's own group and all above it, as far as they can be seen here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60
"""Version 1 says "no limit" by a number that no machine has, a little below 2**63."""


def memory_left(root: Path = ROOT, own: Path = Path("/proc/self/cgroup")) -> int | None:
    """The bytes that can still be had by the tightest group; None: there is no limit."""
    found = [limit - used for limit, used in _memory(root, own)]
    return max(0, min(found)) if found else None


def memory_limit(root: Path = ROOT, own: Path = Path("/proc/self/cgroup")) -> int | None:
    """The tightest limit in bytes; None: there is none."""
    return min((limit for limit, _ in _memory(root, own)), default=None)


def core_limit(root: Path = ROOT, own: Path = Path("/proc/self/cgroup")) -> int | None:
    """The cores of the tightest quota, at least 1; None: there is none."""
    found = []
    for folder in _folders(root, own, "cpu"):
        quota, period = _words(folder / "cpu.max") or ["max", "0"]
        if (folder / "cpu.cfs_quota_us").exists():
            quota, period = (
                (_words(folder / f"cpu.cfs_{name}_us") or ["-1"])[0] for name in ("quota", "period")
            )
        if quota.isdigit() and period.isdigit() and int(period):
            found.append(max(1, int(quota) // int(period)))
    return min(found, default=None)


def _memory(root: Path, own: Path) -> Iterator[tuple[int, int]]:
    """The limits that there are, each with what is used of it. What the kernel would give up at
    once, such as pages of files, does not count as used."""
    for folder in _folders(root, own, "memory"):
        for limit_name, used_name, given_up in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _words(folder / limit_name), _words(folder / used_name)
            if limit and used and limit[0].isdigit() and int(limit[0]) < NO_LIMIT:
                yield int(limit[0]), max(0, int(used[0]) - _stat(folder, given_up))


def _stat(folder: Path, name: str) -> int:
    words = _words(folder / "memory.stat")
    return int(words[words.index(name) + 1]) if name in words else 0


def _folders(root: Path, own: Path, controller: str) -> Iterator[Path]:
    """The folders of the process's groups, from its own to the root of what is seen here."""
    paths = {"": "/", controller: "/"}
    try:
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                paths[controller if controllers else ""] = path
    except (OSError, ValueError):
        pass
    for name, path in paths.items():
        base = root / name
        inner = base / path.lstrip("/")
        while True:
            if ".." not in inner.parts:
                yield inner
            if inner in (base, inner.parent):
                break
            inner = inner.parent


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
