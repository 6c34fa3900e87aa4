"""The time sampler: what it makes of the workers' sums, and when."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from lockstep.agent.observer import NullObserver
from lockstep.agent.time_sampler import TimeSampler, seconds_between
from lockstep.state.control_segment import Stat
from lockstep.system.processes import private_bytes


class Control:
    """Of a control segment, what the sampler looks at."""

    def __init__(self) -> None:
        self.seconds = np.zeros((2, len(Stat)))
        self.exchanged = 8
        self.awaited = [0, 0]

    def awaited_exchange(self, worker_id: int) -> int:
        return self.awaited[worker_id]


class Told(NullObserver):
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def event(self, name: str, **fields: object) -> None:
        assert name == "timed"
        self.events.append(fields)


def test_samples_are_told_when_something_has_been_done() -> None:
    control, told, now = Control(), Told(), [0.0]
    sampler = TimeSampler(control, "a", told, lambda: now[0])  # type: ignore[arg-type]
    for now[0] in (0.2, 0.4, 0.6, 1.1):
        sampler.look((0, 1))  # a long step
    assert not told.events
    control.seconds[0, Stat.COMPUTE] = 0.9
    control.seconds[1, Stat.WAIT] = 0.25
    sampler.look((0, 1))
    assert told.events == [
        {"host": "a", "seconds": 1.1,
         "workers": {"0": [0.9, 0, 0, 0, 0, 0, 0], "1": [0, 0, 0.25, 0, 0, 0, 0]}}
    ]  # fmt: skip
    now[0] = 1.3
    control.seconds[0, Stat.COMPUTE] = 1.0
    sampler.look((0, 1))
    assert len(told.events) == 1  # too soon
    sampler.flush()
    sampler.flush()
    assert [event["workers"] for event in told.events[1:]] == [{"0": [0.1, 0, 0, 0, 0, 0, 0]}]


def test_waiting_for_other_hosts_is_a_part_of_reducing_and_updating() -> None:
    after = [4.0, 0.0, 0.0, 3.0, 2.0, 1.0]
    assert seconds_between([0.0] * 6, after, 0.0) == [4.0, 0.0, 0.0, 3.0, 0.0, 2.0, 1.0]
    assert seconds_between([0.0] * 6, after, 0.2) == [4.0, 0.0, 0.0, 1.0, 2.0, 2.0, 1.0]
    assert seconds_between([0.0] * 6, after, 0.4) == [4.0, 0.0, 0.0, 0.0, 4.0, 1.0, 1.0]
    whole = seconds_between([0.0] * 6, after, 1.0)
    assert whole == [4.0, 0.0, 0.0, 0.0, 5.0, 0.0, 1.0]
    assert sum(whole) == pytest.approx(sum(after))


def test_looks_that_meet_a_worker_waiting_are_counted() -> None:
    control, told, now = Control(), Told(), [0.0]
    sampler = TimeSampler(control, "a", told, lambda: now[0])  # type: ignore[arg-type]
    for control.awaited[0] in (16, 8, 16, 0):  # it waits at two looks of four
        now[0] += 0.4
        control.seconds[0, Stat.REDUCE] += 0.1
        sampler.look((0,))
    (event,) = told.events
    exchange = event["workers"]["0"][4]
    assert exchange == pytest.approx(0.3 * 2 / 3)  # the first three looks were told


def test_memory_of_those_who_have_worked_is_told() -> None:
    control, told, now = Control(), Told(), [1.0]
    sizes = {0: 5_000_000, 1: 0}  # of the other it cannot be said: it has died
    sampler = TimeSampler(control, "a", told, lambda: now[0], memory_of=sizes.__getitem__)  # type: ignore[arg-type]
    control.seconds[:, Stat.COMPUTE] = 0.5
    sampler.flush()
    assert told.events[0]["memory"] == {"0": 5_000_000}


def test_private_memory() -> None:
    """What a process has written to counts, shared memory does not."""
    code = (
        "import mmap, sys, time; m = mmap.mmap(-1, 1 << 26); m.write(bytes(1 << 26)); "
        "own = bytearray(1 << 25); print(len(own), flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert 1 << 25 < private_bytes(child.pid) < 1 << 26
    finally:
        child.kill()
        child.wait()
    assert private_bytes(child.pid) == 0
