"""Masters in processes of their own: to be signalled, killed and looked after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import lockstep
from tests.conftest import environment_of, processes, wait_for_end
from tests.support.harmed_runs import Event, Yard, await_event, events
from tests.support.paced_task import PACE

PACED = f"{Path(__file__).with_name('paced_task.py')}:Paced"
STEPS, SHARDS = 240, 4
SETTINGS = {"steps": STEPS, "batch_size": 24, "shards": SHARDS, "threads": 1, "seed": 5}
"""4 steps to a data epoch, after each of which is evaluated."""
WAIT_SECONDS = 60.0


class Master:
    """A `lockstep` process and all that it has started."""

    def __init__(self, *arguments: str, folder: str | Path, pace: float = 0.004) -> None:
        self.folder = Path(folder)
        value = uuid.uuid4().hex
        self.mark = f"LOCKSTEP_TEST_MASTER={value}".encode()
        environment = os.environ | {"LOCKSTEP_TEST_MASTER": value, PACE: str(pace)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lockstep", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def await_event(self, wanted: Callable[[Event], bool], what: str = "") -> Event:
        """The first event that is wanted, once it is there."""

        def check_alive() -> None:
            if self.process.poll() is not None:
                raise AssertionError(f"the master has ended: {self.end()}")

        return await_event(self.folder, wanted, WAIT_SECONDS, what or "an event", check_alive)

    def await_step(self, step: int) -> None:
        """Return when so many steps have been evaluated."""
        self.await_event(lambda event: event["event"] == "evaluated" and event["step"] >= step)

    def workers(self) -> dict[int, int]:
        """Seats and process ids of the workers that live, by the events."""
        alive: dict[int, int] = {}
        for event in events(self.folder, "joined", "died"):
            if event["event"] == "joined":
                alive[event["worker"]] = event["pid"]
            elif alive.get(event["worker"]) == event["pid"]:
                del alive[event["worker"]]
        return alive

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, seconds: float = WAIT_SECONDS) -> tuple[int, str]:
        """Wait for the end of the master; its exit code and what it said on stderr."""
        _, said = self.process.communicate(timeout=seconds)
        return self.process.returncode, said

    def left(self, seconds: float) -> set[int]:
        """Processes of this master's that are still there after so many seconds."""
        limit = time.monotonic() + seconds
        while (left := processes_of(self.mark)) and time.monotonic() < limit:
            for pid in left:
                wait_for_end(pid, limit)
        return left

    def close(self) -> None:
        """Leave nothing behind, whatever happened."""
        for pid in processes_of(self.mark):
            os.kill(pid, signal.SIGKILL)
        self.process.communicate(timeout=10)


def processes_of(mark: bytes) -> set[int]:
    """The processes with this mark in their environment."""
    return {pid for pid in processes(mark) if mark in environment_of(pid)}


Start = Callable[..., Master]


@pytest.fixture
def master(yard: Yard) -> Iterator[Start]:
    """Starts masters: `master()` runs the paced task, `master("resume", ...)` anything."""
    started: list[Master] = []

    def start(*arguments: str, folder: str | None = None, pace: float = 0.004) -> Master:
        folder = folder or yard.path()
        command: Sequence[str] = arguments
        if not arguments or arguments[0].startswith("--"):
            settings = [f"--{k.replace('_', '-')}={v}" for k, v in SETTINGS.items()]
            command = ["run", PACED, *settings, "--quiet", f"--out={folder}", *arguments]
        started.append(Master(*command, folder=folder, pace=pace))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def wanted(yard: Yard) -> lockstep.Result:
    """The paced task's run, undisturbed."""
    return yard.undisturbed(PACED, **SETTINGS)
