"""Runs whose forkserver is a fork of a process that has torch loaded: as any other, only sooner."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Dataset

import lockstep
from lockstep.errors import WorkerLostError
from tests.zoo.vectors import Vectors

Run = Callable[..., lockstep.Result]


class Told(Vectors):
    """Writes down where it was loaded, and says it on stderr."""

    def __init__(self, note: Path) -> None:
        self.note = note

    def train_data(self) -> Dataset[Any]:
        self.note.write_text(f"{os.getpid()} {os.getppid()} {os.environ.get('TOLD', '')}")
        print("loaded here", file=sys.stderr)
        return super().train_data()


class Killed(Told):
    """Its forkserver is killed, as by the out-of-memory killer."""

    def train_data(self) -> Dataset[Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().train_data()


@pytest.fixture
def run(tmp_path: Path, run_folders: Callable[[], str]) -> Run:
    def start(kind: type[Told] = Told, **settings: Any) -> lockstep.Result:
        settings = {
            "workers": 2,
            "shards": 4,
            "threads": 1,
            "batch_size": 26,
            "steps": 3,
            **settings,
        }
        return lockstep.run(kind(tmp_path / "note"), out=run_folders(), quiet=True, **settings)

    return start


@pytest.fixture
def note(tmp_path: Path) -> Callable[[], tuple[int, str]]:
    """The parent of the last run's forkserver, and what `TOLD` was in it."""

    def read() -> tuple[int, str]:
        _, parent, told = (tmp_path / "note").read_text().split(" ")
        return int(parent), told

    return read


Note = Callable[[], tuple[int, str]]


@pytest.mark.long
def test_the_same_bits_from_a_fork(
    run: Run, note: Note, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the environment and the stderr that this process has now."""
    monkeypatch.setenv("TOLD", "today")
    forked = run()
    parent, told = note()
    assert parent != os.getpid()
    assert told == "today"
    assert "loaded here" in capfd.readouterr().err
    monkeypatch.setenv("OMP_DISPLAY_ENV", "FALSE")
    started = run()
    assert note()[0] == os.getpid()
    assert forked.fingerprint == started.fingerprint


@pytest.mark.long
def test_other_numerics_have_a_process_of_their_own(run: Run, note: Note) -> None:
    run(numerics="portable")
    assert note()[0] == os.getpid()


@pytest.mark.long
def test_a_preloaded_process_that_was_killed(run: Run, note: Note) -> None:
    """The next run loads torch for itself; and what it was preloaded within is there again."""
    run()
    outer = note()[0]
    with lockstep.preloaded():
        run()
        inner = note()[0]
        os.kill(inner, signal.SIGKILL)
        run()
        assert note()[0] == os.getpid()
    run()
    assert note()[0] == outer != inner


def test_how_a_fork_was_lost_is_told(run: Run) -> None:
    with pytest.raises(WorkerLostError, match="the forkserver") as caught:
        run(Killed)
    assert "SIGKILL" in caught.value.found
