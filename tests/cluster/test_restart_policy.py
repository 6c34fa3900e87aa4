"""Agents that die under `join` are followed by others: the decision, and real ones."""

from __future__ import annotations

import os
import queue
import signal
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.cluster.daemon.reconnecting_line import pause
from lockstep.cluster.daemon.restart_policy import (
    MOST_DEATHS,
    AgentRun,
    Died,
    Done,
    Event,
    Offered,
    Withdrawn,
    decide,
)
from lockstep.errors import (
    JobError,
    LockstepError,
    PeerClosedError,
    PeerTimeoutError,
    RefusedError,
    TaskError,
    WorkerLostError,
)
from tests.support.daemons import LIMIT, Daemon
from tests.support.harmed_runs import Event as Entry
from tests.support.harmed_runs import Yard, assert_same, await_event, events, yard
from tests.support.loopback_cluster import Loopback, cluster
from tests.support.ray_cluster import GATE

__all__ = ["cluster", "yard"]  # fixtures

KILLED = WorkerLostError("an agent died", found="signal 9")
DIED, MOVED = Died(KILLED, False), Died(KILLED, True)


def waits(*events: Event) -> list[float | None]:
    """After each event, in how many seconds another agent is started."""
    run, found = AgentRun(), []
    for event in events:
        run, reason = decide(run, event)
        assert reason
        found.append(run.wait)
    return found


def test_pauses_grow_up_to_a_limit() -> None:
    pauses = waits(*[DIED] * MOST_DEATHS)
    assert pauses == [*(pause(deaths) for deaths in range(1, MOST_DEATHS)), None]


def test_a_step_in_between_makes_deaths_count_anew() -> None:
    found = waits(*[DIED] * (MOST_DEATHS - 1), MOVED, *[DIED] * (MOST_DEATHS - 1))
    first = pause(1)
    assert found[MOST_DEATHS - 1] == first
    assert found[MOST_DEATHS:] == [*(pause(deaths) for deaths in range(2, MOST_DEATHS)), None]


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (KILLED, True),
        (PeerClosedError("host a closed"), True),
        (PeerTimeoutError("host a is silent"), True),
        (RefusedError("host b may not take part"), False),
        (JobError("no such task"), False),
        (TaskError("the task raised"), False),
    ],
)
def test_which_ends_are_deaths(error: LockstepError, again: bool) -> None:
    (wait,) = waits(Died(error, True))
    assert (wait is not None) == again


def test_only_for_a_job_that_is_offered() -> None:
    assert waits(Withdrawn(), DIED)[-1] is None
    assert waits(Withdrawn(), Offered(), DIED)[-1] == pause(1)
    assert waits(Done()) == [None]
    assert waits(DIED, Done())[-1] is None


# Real ones.

TASK = "tests.support.gated_task:Gated"
SETTINGS: dict[str, Any] = {"batch_size": 24, "shards": 3, "threads": 1, "seed": 5, "steps": 300}
ROOT = Path(__file__).parents[2]


def agent_of(member: Daemon) -> int:
    """The process id of the agent that a host starts next."""
    return int(member.until(": agent ").partition(": agent ")[2].partition(",")[0])


@pytest.mark.long
def test_an_agent_that_is_killed_twice_comes_back_twice(
    cluster: Loopback, yard: Yard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On three hosts, under `up` and `join`: it takes part again, and the bits are the same."""
    gate, folder = tmp_path / "gate", yard.path()
    gate.touch()
    monkeypatch.setenv(GATE, str(gate))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    cluster.up()
    b, c = (cluster.member(name, "--allow", "tests.support.gated_task") for name in "bc")
    reports: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    with cluster.launcher(reports) as launcher:
        run = lockstep.start(TASK, on=launcher, workers=3, out=folder, quiet=True, **SETTINGS)

        def await_part(losses: int) -> None:
            """Wait until host b takes part, when it was lost so many times."""

            def check_alive() -> None:
                if not run.running:
                    raise AssertionError(f"the run has ended: {run.result()}")

            def wanted(_: Entry) -> bool:
                told = events(folder, "host_lost", "hosts")
                lost = [place for place, each in enumerate(told) if each["event"] == "host_lost"]
                since = told[lost[-1] + 1 if lost else 0 :]
                there = any(each["going_on"] and "b" in each["hosts"] for each in since)
                return there and len(lost) == losses

            await_event(folder, wanted, LIMIT, f"host b after {losses} losses", check_alive)

        for losses in (0, 1):
            pid = agent_of(b)
            await_part(losses)
            os.kill(pid, signal.SIGKILL)
            who, why = reports.get(timeout=LIMIT)
            assert who == "b"
            assert "signal 9" in why
            assert "another one is started" in why
        agent_of(b)
        await_part(2)
        assert set(cluster.hosts()["b"].values()) == {"taken"}
        gate.unlink()
        found = run.result(LIMIT)
    assert_same(found, yard.undisturbed(TASK, **SETTINGS))
    assert [event["host"] for event in events(folder, "host_lost")] == ["b", "b"]
    told = [each for each in events(folder, "connection") if "another one" in each["why"]]
    assert [each["peer"] for each in told] == ["b", "b"]
    for member in (b, c):
        member.until("its agent has ended")
        assert member.end() == 0
