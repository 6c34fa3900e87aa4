"""Limits of control groups, of both versions, at every level."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.system.cgroup import core_limit, memory_left, memory_limit

GIB = 1 << 30


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "self"


def test_none(tmp_path: Path, own: Path) -> None:
    assert memory_left(tmp_path, own) is None
    assert memory_limit(tmp_path, own) is None
    assert core_limit(tmp_path, own) is None


def test_version_2_at_the_root(tmp_path: Path, own: Path) -> None:
    write(tmp_path, memory__max=str(4 * GIB), memory__current=str(GIB), cpu__max="150000 100000")
    assert memory_left(tmp_path, own) == 3 * GIB
    assert core_limit(tmp_path, own) == 1


def test_version_2_the_tightest_counts(tmp_path: Path, own: Path) -> None:
    own.write_text("0::/a/b\n")
    write(tmp_path / "a", memory__max=str(2 * GIB), memory__current=str(GIB))
    write(tmp_path / "a" / "b", memory__max="max", memory__current=str(GIB // 2))
    write(tmp_path / "a" / "b", cpu__max="max 100000")
    assert memory_left(tmp_path, own) == GIB
    assert memory_limit(tmp_path, own) == 2 * GIB
    assert core_limit(tmp_path, own) is None


def test_version_1(tmp_path: Path, own: Path) -> None:
    own.write_text("4:memory:/jobs/one\n3:cpu,cpuacct:/jobs\n")
    folder = tmp_path / "memory" / "jobs" / "one"
    write(folder, memory__limit_in_bytes=str(3 * GIB), memory__usage_in_bytes=str(2 * GIB))
    write(folder, memory__stat=f"cache 5\ntotal_inactive_file {GIB}")
    write(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712",
          memory__usage_in_bytes=str(5 * GIB))  # fmt: skip
    write(tmp_path / "cpu" / "jobs", cpu__cfs_quota_us="300000", cpu__cfs_period_us="100000")
    assert memory_left(tmp_path, own) == 2 * GIB
    assert core_limit(tmp_path, own) == 3


def test_version_1_without_a_limit(tmp_path: Path, own: Path) -> None:
    write(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712",
          memory__usage_in_bytes="1")  # fmt: skip
    write(tmp_path / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert memory_left(tmp_path, own) is None
    assert core_limit(tmp_path, own) is None


def test_a_path_that_leads_out_is_not_followed(tmp_path: Path, own: Path) -> None:
    own.write_text("0::/../../x\n")
    write(tmp_path, memory__max=str(GIB), memory__current="0")
    assert memory_left(tmp_path, own) == GIB
