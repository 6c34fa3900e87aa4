"""Moments that a random fault hits once in a thousand runs, each brought about on purpose."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import lockstep
from lockstep.errors import StoppedError
from lockstep.faults import Fault
from lockstep.layout import cut_blocks, own_blocks
from tests.faulty import Yard, events, until, yard
from tests.zoo import CLASSES, FEATURES, Vectors

__all__ = ["yard"]  # a fixture

WAIT = 20.0
"""Seconds: the longest that a test waits for an event."""


class OneBlock(Vectors):
    """One block and batch statistics: of three workers only the second owns anything."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, CLASSES, bias=False), nn.BatchNorm1d(CLASSES, affine=False)
        )


def test_an_audit_after_the_buffers_were_combined(yard: Yard) -> None:
    """Rank 0, which owns no block, has combined the buffers when the only owner goes away: shards
    that were computed again from them would not give the bytes that they gave before."""
    blocks = cut_blocks([FEATURES * CLASSES], [True])
    assert [len(part) for part in own_blocks(blocks, 3)] == [0, 1, 0]
    stop = Fault(seat=1, step=2, phase="update_begin", kind="stop")
    settings: dict[str, Any] = {"steps": 4, "batch_size": 26, "audit": 1.0, "stall_seconds": 0.5}
    result = yard.check(OneBlock(), faults=(stop,), **settings)
    (died,) = events(result.folder, "died")
    assert (died["step"], died["undone"]) == (2, True)
    assert events(result.folder, "corrupt") == []


# A run in the background, and what is asked of it.


@pytest.fixture
def endless() -> Iterator[Callable[..., lockstep.Run]]:
    """Starts runs that end when the test does."""
    started: list[lockstep.Run] = []

    def start(**settings: Any) -> lockstep.Run:
        settings = {"threads": 1, "steps": 10**6, "batch_size": 26, "evaluate": False, **settings}
        started.append(lockstep.start(Vectors(), quiet=True, **settings))
        first = Path(settings["out"], "events.jsonl")
        until(lambda: first.exists() and events(settings["out"], "first_step"), WAIT, "a step")
        return started[-1]

    yield start
    for run in started:
        run.stop()
        with pytest.raises(StoppedError):
            run.result(WAIT)


Start = Callable[..., lockstep.Run]


def test_a_lone_worker_lets_another_join(endless: Start, run_folder: str) -> None:
    """It waits for nobody, so no barrier tells it: it comes to rest where its lease ends."""
    run = endless(workers=1, max_workers=2, shards=2, out=run_folder)
    run.scale(2)
    until(lambda: formed(run_folder)[-1] == [0, 1], WAIT, "two members")
    run.scale(1)
    until(lambda: formed(run_folder)[-1] == [0], WAIT, "one member")


def formed(folder: str) -> list[list[int]]:
    return [event["seats"] for event in events(folder, "formed")]


def test_a_checkpoint_while_paused(endless: Start, run_folder: str) -> None:
    run = endless(workers=2, shards=2, out=run_folder)
    run.pause()
    until(lambda: events(run_folder, "paused"), WAIT, "a pause")
    run.checkpoint()
    (written,) = until(lambda: events(run_folder, "checkpoint"), WAIT, "a checkpoint")
    (paused,) = events(run_folder, "paused")
    assert written["step"] == paused["step"]
    os.kill(events(run_folder, "joined")[0]["pid"], signal.SIGKILL)
    until(lambda: len(formed(run_folder)) > 2, WAIT, "a replacement")
    run.go_on()
    until(lambda: events(run_folder, "recovered"), WAIT, "the next step")
