"""Folders with keys: they are gone when their owner ends, or when the next one begins."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.system.folders import LOCK, TemporaryFolder

PREFIX = "lockstep-test-"
OWNER = f"""
import sys
from lockstep.system.folders import TemporaryFolder
with TemporaryFolder({PREFIX!r}) as folder:
    (folder.path / "node.key").write_text("secret")
    print(folder.path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, of these tests and the processes that they start."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@contextlib.contextmanager
def owner() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process with a folder, and where that is."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate()


def test_it_is_private_and_goes_with_its_owner() -> None:
    with owner() as (process, path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        process.communicate("")
        assert process.returncode == 0
        assert not path.exists()


def test_what_killed_owners_leave_is_removed_by_the_next() -> None:
    """And nothing of those that live, whoever looks."""
    with owner() as (first, left), owner() as (_, kept), TemporaryFolder(PREFIX) as mine:
        first.kill()
        first.wait()
        assert (left / "node.key").exists()
        with TemporaryFolder(PREFIX) as next_one:
            assert not left.exists()
            assert (kept / "node.key").exists()
            assert mine.path.exists()
        assert not next_one.path.exists()


def test_what_is_no_such_folder_is_left_alone(place: Path) -> None:
    """One that is being made, a link to one elsewhere, a file, another kind, and a lock that leads
    elsewhere."""
    elsewhere = place / "elsewhere"
    for folder in (place / f"{PREFIX}new", elsewhere, place / "lockstep-other-1"):
        folder.mkdir()
    for folder in (elsewhere, place / "lockstep-other-1"):
        (folder / LOCK).touch()
    (place / f"{PREFIX}link").symlink_to(elsewhere)
    (place / f"{PREFIX}file").touch()
    (place / f"{PREFIX}led").mkdir()
    (place / f"{PREFIX}led" / LOCK).symlink_to(elsewhere / LOCK)
    before = sorted(place.rglob("*"))
    with TemporaryFolder(PREFIX):
        pass
    assert sorted(place.rglob("*")) == before


def test_a_folder_that_is_closed_twice() -> None:
    folder = TemporaryFolder(PREFIX)
    descriptors = len(os.listdir("/proc/self/fd"))
    folder.close()
    folder.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1
