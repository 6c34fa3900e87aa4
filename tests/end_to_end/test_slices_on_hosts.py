"""Hosts of which each has some of the slices alone: the bits of one worker, whoever dies."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.errors import JobError
from lockstep.job.faults import Fault
from tests.support.agents_on_loopback import Agents
from tests.support.harmed_runs import Yard, assert_same, assert_struck, events, yard
from tests.support.multi_host_runs import (
    PACED,
    TASK,
    WAIT,
    Live,
    Site,
    check_joining_and_leaving,
    ended_well,
    site,
    slow,
)
from tests.support.sliced_tasks import PACKAGES, TASKS

__all__ = ["site", "slow", "yard"]  # fixtures

SETTINGS: dict[str, Any] = {
    "shards": 3, "batch_size": 12, "steps": 4, "threads": 1, "slices": 4, "trace": "never",
    "purity": 0.0, "args": {"drop": 0.2},
}  # fmt: skip


def task_of(name: str) -> str:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    return f"tests.support.sliced_tasks:{TASKS[name].__name__}"


def alone(yard: Yard, name: str, **settings: Any) -> lockstep.Result:
    """The run of one worker."""
    return yard.run(task_of(name), workers=1, **{**SETTINGS, **settings})


def on_hosts(yard: Yard, on: Agents, name: str, **settings: Any) -> lockstep.Result:
    """The run of hosts that share the slices."""
    settings = {**SETTINGS, "ownership": "slices", **settings}
    return lockstep.run(task_of(name), on=on, out=yard.path(), quiet=True, **settings)


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "encoder",
        *(pytest.param(each, marks=pytest.mark.long) for each in ("llama", "t5", "table")),
    ],
)
def test_same_bits_on_two_hosts(name: str, site: Site, yard: Yard) -> None:
    on = site.agents({"b": 1}, 1)
    found = on_hosts(yard, on, name)
    ended_well(on)
    assert_same(found, alone(yard, name))
    assert not events(found.folder, "died", "corrupt", "host_lost")


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_grad_norm": 0.1, "precision": "bf16"},
        pytest.param({"shards": 1, "batch_size": 5}, marks=pytest.mark.long),
        pytest.param({"loaders": 1, "shards": 5}, marks=pytest.mark.long),
    ],
)
def test_three_hosts_of_two_workers(settings: dict[str, Any], site: Site, yard: Yard) -> None:
    """Four slices over three hosts, and more shards than workers that compute them."""
    count = 1 if settings.get("shards") == 1 else 2
    on = site.agents({"b": count, "c": count}, count)
    found = on_hosts(yard, on, "encoder", **settings)
    ended_well(on)
    assert_same(found, alone(yard, "encoder", **settings))


@pytest.mark.parametrize("host", ["", "b"])
@pytest.mark.parametrize(
    "phase",
    [
        "team_forward",
        pytest.param("team_backward", marks=pytest.mark.long),
        pytest.param("team_slot", marks=pytest.mark.long),
        pytest.param("barrier", marks=pytest.mark.long),
        "update_begin",
        pytest.param("evaluate", marks=pytest.mark.long),
    ],
)
def test_a_death_in_each_phase(phase: str, host: str, site: Site, yard: Yard) -> None:
    """Of a worker of the master's, or of another host's."""
    on = site.agents({"b": 2}, 2)
    step = SETTINGS["steps"] if phase == "evaluate" else 2
    fault = Fault(worker_id=-1, host=host or "master", step=step, phase=phase)
    found = on_hosts(yard, on, "encoder", faults=(fault,))
    ended_well(on)
    assert_struck(found.folder, [fault])
    assert_same(found, alone(yard, "encoder"))


@pytest.mark.parametrize(
    ("others", "phase"),
    [
        ({"b": 1}, "team_backward"),
        pytest.param({"b": 1, "c": 1}, "team_forward", marks=pytest.mark.long),
        pytest.param({"b": 1, "c": 1}, "evaluate", marks=pytest.mark.long),
    ],
)
def test_a_host_dies(others: dict[str, int], phase: str, site: Site, yard: Yard) -> None:
    """Its slices were in the master's snapshot: those that are left share them."""
    on = site.agents(others, 1)
    step = SETTINGS["steps"] if phase == "evaluate" else 3
    fault = Fault(worker_id=0, host="b", step=step, phase=phase, kind="host")
    found = on_hosts(yard, on, "encoder", faults=(fault,))
    ended_well(on, "b")
    assert [event["host"] for event in events(found.folder, "host_lost")] == ["b"]
    assert_same(found, alone(yard, "encoder"))


def test_joining_and_leaving(site: Site, slow: None) -> None:
    """A host joins, another is killed, the run is stopped and resumed on one."""
    check_joining_and_leaving(site, {"b": 1}, "c", "b", slices=3, ownership="slices", purity=0.0)


def test_scaled_down_under_way(site: Site, slow: None) -> None:
    """A worker of the master's goes, and with it a team."""
    on = site.agents({"b": 2}, 2)
    live = Live(site, on, steps=60, slices=2, ownership="slices", purity=0.0)
    live.await_step(8)
    live.run.scale(1)
    live.wait_for(lambda e: e["event"] == "formed" and e["seats"] == [0], "a smaller group")
    found = live.run.result(WAIT)
    ended_well(on)
    assert_same(found, site.yard.undisturbed(TASK, **{**PACED, "steps": 60, "slices": 2}))


class Look(lockstep.Callback):
    """Looks at how much of the state, and of the slots, two hosts have in memory."""

    def __init__(self, on: Agents) -> None:
        self.on, self.shares = on, list[float]()

    def on_step(self, step: lockstep.StepDone) -> None:
        if step.step == 3:
            self.shares = [
                share
                for pid in (self.on.processes["b"].pid, os.getpid())
                for share in (resident(pid, "state"), resident(pid, "slots"))
            ]


def resident(pid: int, segment: str) -> float:
    """The part of a process's segment that takes memory."""
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if f"memfd:lockstep-{segment}" in os.readlink(fd):
                found = fd.stat()
                return found.st_blocks * 512 / found.st_size
    raise AssertionError(f"process {pid} has no {segment}")


def test_each_host_has_memory_for_its_slices(site: Site, yard: Yard) -> None:
    """And none for another's, but on the master's disk."""
    on = site.agents({"b": 1}, 1)
    look = Look(on)
    found = on_hosts(yard, on, "broad", slices=2, shards=1, callbacks=[look])
    assert_same(found, alone(yard, "broad", slices=2, shards=1))
    for share, most in zip(look.shares, (0.55, 0.3, 0.55, 0.3), strict=True):
        assert 0.0 < share < most, look.shares  # of the slots, those of sums are not used


def test_more_hosts_than_slices(site: Site, yard: Yard) -> None:
    on = site.agents({"b": 1, "c": 1}, 1)
    with pytest.raises(JobError, match="more hosts than slices"):
        on_hosts(yard, on, "mlp", slices=2)
    on.wait()
