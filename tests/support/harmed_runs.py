"""Runs that are harmed, and what they must equal: the same run undisturbed, to the byte."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.job.faults import Fault
from lockstep.job.task import Task

LETHAL = ("kill", "segfault", "exit")
HOW = {
    "kill": "was killed by SIGKILL",
    "segfault": "was killed by SIGSEGV",
    "exit": "exited with code 3",
}
"""How the master tells the end of a worker that a fault of this kind has struck."""

IRRELEVANT = (
    "faults", "stall_seconds", "out", "workers", "max_workers", "checkpoint_steps",
    "checkpoint_seconds", "keep_checkpoints", "loaders", "ownership", "servers", "device",
    "native", "trace",
)  # fmt: skip
"""Settings that no number depends on."""

Event = dict[str, Any]


def events(folder: str | Path, *names: str) -> list[Event]:
    """A run's events of these names, or all of them. A line that is being written is left out."""
    found = []
    for line in (Path(folder) / "events.jsonl").read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if not names or event["event"] in names:
            found.append(event)
    return found


def await_event(
    folder: str | Path,
    wanted: Callable[[Event], bool],
    seconds: float,
    what: str,
    check_alive: Callable[[], None],
) -> Event:
    """The first event of a run that is wanted, once it is there. `check_alive` raises if the run
    has ended."""

    def look() -> Event | None:
        check_alive()
        if not (Path(folder) / "events.jsonl").exists():
            return None
        return next((event for event in events(folder) if wanted(event)), None)

    found: Event = until(look, seconds, what)
    return found


def ledger(folder: str | Path) -> bytes:
    return (Path(folder) / "ledger.jsonl").read_bytes()


class Yard:
    """Makes runs of one test session; undisturbed ones are made once for all that ask."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = itertools.count()
        self._undisturbed: dict[str, lockstep.Result] = {}

    def path(self) -> str:
        return str(self.folder / f"run-{next(self._numbers)}")

    def run(self, task: Task | str, **settings: Any) -> lockstep.Result:
        """Run on three workers, six shards and a thread each, unless told otherwise."""
        settings = {"workers": 3, "shards": 6, "threads": 1, "out": self.path(), **settings}
        return lockstep.run(task, quiet=True, **settings)

    def undisturbed(self, task: Task | str, **settings: Any) -> lockstep.Result:
        """The run without faults, and with the other settings that the numbers depend on."""
        vital = {k: v for k, v in settings.items() if k not in IRRELEVANT}
        name = task if isinstance(task, str) else f"{type(task).__name__} {vars(task)}"
        key = f"{name} {sorted(vital.items())}"
        if key not in self._undisturbed:
            self._undisturbed[key] = self.run(task, **vital)
        return self._undisturbed[key]

    def check(self, task: Task | str, **settings: Any) -> lockstep.Result:
        """Run with faults, and compare with the run without."""
        harmed = self.run(task, **settings)
        assert_same(harmed, self.undisturbed(task, **settings))
        return harmed


@pytest.fixture(scope="session")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Yard:
    return Yard(tmp_path_factory.mktemp("yard"))


def assert_same(found: lockstep.Result, wanted: lockstep.Result) -> None:
    """The same bits in the ledger, the state, the model and the metrics."""
    step = first_difference(ledger(found.folder), ledger(wanted.folder))
    assert step is None, f"the ledgers part at step {step}: {events(found.folder, 'died')}"
    assert found.fingerprint == wanted.fingerprint
    for name in ("model.safetensors",):
        assert (found.folder / name).read_bytes() == (wanted.folder / name).read_bytes()
    assert found.metrics == wanted.metrics
    assert found.history == wanted.history


def first_difference(found: bytes, wanted: bytes) -> int | str | None:
    """The step at which two ledgers part, or None."""
    for mine, other in itertools.zip_longest(found.splitlines(), wanted.splitlines()):
        if mine != other:
            line = json.loads(mine or other)
            return int(line["step"]) if "step" in line else "none, but begin or end"
    return None


def assert_struck(folder: str | Path, faults: Sequence[Fault]) -> None:
    """Each fault that kills has killed somebody, at its step."""
    deaths = [(event["step"], event["how"]) for event in events(folder, "died")]
    for fault in faults:
        assert (fault.step, HOW[fault.kind]) in deaths, f"{fault} did not strike: {deaths}"


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait for a condition, looking at it every few milliseconds; its value.

    Time in which this process itself was held up does not count.
    """
    import select
    import time

    left, last = seconds, time.monotonic()
    while not (value := condition()):
        now = time.monotonic()
        left, last = left - min(now - last, 0.1), now
        if left < 0:
            raise AssertionError(f"not within {seconds} s: {what}")
        select.select([], [], [], 0.005)
    return value
