"""Runs on several hosts of this machine, beside the same runs on one."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.errors import StoppedError
from tests.support.agents_on_loopback import Agents
from tests.support.harmed_runs import Event, Yard, assert_same, await_event, yard
from tests.support.paced_task import PACE
from tests.support.tls_hosts import Cluster
from tests.zoo import FAILING, MORE, ZOO

__all__ = ["yard"]  # a fixture

SHARDS = 6
WAIT = 60.0


class Site:
    """Makes runs on several hosts, and the same runs on one."""

    def __init__(self, yard: Yard, folder: Path) -> None:
        self.yard, self.folder = yard, folder
        self._numbers = itertools.count()
        self.opened: list[Agents] = []

    def agents(self, others: Mapping[str, int], here: int = 1) -> Agents:
        folder = self.folder / f"site-{next(self._numbers)}"
        folder.mkdir()
        self.opened.append(Agents(Cluster(folder), others, here))
        return self.opened[-1]

    def settings(self, name: str, **changes: Any) -> dict[str, Any]:
        entry = {**ZOO, **MORE, **FAILING}[name]
        shared = {"args": {"name": name}, "shards": SHARDS, "threads": 1}
        return {**entry.settings(), **shared, **changes}

    def run(self, name: str, on: Agents, **changes: Any) -> lockstep.Result:
        settings = self.settings(name, **changes)
        workers = (on.workers or 1) + sum(on.names.values())
        return lockstep.run(
            "tests.zoo:named", on=on, workers=workers, out=self.yard.path(), quiet=True, **settings
        )

    def alone(self, name: str, **changes: Any) -> lockstep.Result:
        settings = self.settings(name, **changes)
        return self.yard.undisturbed("tests.zoo:named", **settings)

    def check(self, name: str, on: Agents, **changes: Any) -> lockstep.Result:
        """Run on hosts, and compare with one host to the byte."""
        found = self.run(name, on, **changes)
        changes.pop("faults", None)
        assert_same(found, self.alone(name, **changes))
        return found


@pytest.fixture
def site(yard: Yard, tmp_path: Path) -> Iterator[Site]:
    made = Site(yard, tmp_path)
    yield made
    for agents in made.opened:
        agents.wait()


def ended_well(on: Agents, *killed: str) -> None:
    codes = on.wait()
    wanted = {name: -signal.SIGKILL if name in killed else 0 for name in codes}
    assert codes == wanted, [on.log(name) for name in codes]


PACED: dict[str, Any] = {"batch_size": 24, "shards": SHARDS, "threads": 1, "seed": 5}
TASK = "tests.support.paced_task:Paced"


class Live:
    """A run of the paced task in the background, to be steered by what happens in it."""

    def __init__(self, site: Site, on: Agents, **changes: Any) -> None:
        self.folder = site.yard.path()
        workers = (on.workers or 1) + sum(on.names.values())
        self.run = lockstep.start(
            changes.pop("task", TASK),
            on=on,
            workers=workers,
            out=self.folder,
            quiet=True,
            **{**PACED, **changes},
        )

    def wait_for(self, wanted: Callable[[Event], bool], what: str) -> Event:
        def check_alive() -> None:
            if not self.run.running:
                raise AssertionError(f"the run has ended: {self.run.result()}")

        return await_event(self.folder, wanted, WAIT, what, check_alive)

    def await_step(self, step: int) -> None:
        self.wait_for(lambda e: e["event"] == "evaluated" and e["step"] >= step, f"step {step}")

    def await_host(self, name: str) -> None:
        """Wait until a host works."""
        self.wait_for(lambda e: e["event"] == "formed" and e.get("host") == name, f"host {name}")

    def await_loss(self, name: str) -> Event:
        """Wait until a host is given up."""
        return self.wait_for(
            lambda e: e["event"] == "host_lost" and e["host"] == name, f"the loss of {name}"
        )


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard takes its time, on every host."""
    monkeypatch.setenv(PACE, "0.004")


def check_joining_and_leaving(
    site: Site, others: Mapping[str, int], joins: str, killed: str, **changes: Any
) -> None:
    """A host joins, another is killed, the run is stopped and resumed: the bits of one host. Called
    with the fixture `slow`."""
    changes = {"steps": 500, "checkpoint_steps": 150, **changes}
    task = changes.setdefault("task", TASK)
    on = site.agents(others, 1)
    live = Live(site, on, **changes)
    live.await_step(40)
    on.start(joins, 1)
    live.await_host(joins)
    on.signal(killed)
    live.await_loss(killed)
    # On a slow machine step 200 is long past: to stop amid the regrouping would drop more hosts.
    live.wait_for(
        lambda event: event["event"] == "recovered" and event.get("host") == killed, "a recovery"
    )
    live.await_step(200)
    live.run.stop()
    with pytest.raises(StoppedError):
        live.run.result(WAIT)
    ended_well(on, killed)
    os.environ[PACE] = "0"
    resumed = lockstep.resume(live.folder, quiet=True)
    del changes["task"]
    assert_same(resumed, site.yard.undisturbed(task, **PACED, **changes))
