"""What is lost with parts of a Ray cluster that die under a job: its driver, and its head."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

from lockstep.cluster.ray.launcher import on_ray
from lockstep.errors import NetworkError
from tests.conftest import describe, processes
from tests.support.harmed_runs import Yard, assert_same, events, until, yard
from tests.support.ray_cluster import LIMIT, RayNodes
from tests.support.ray_runs import PATIENCE, SETTINGS, TASK, Watched, in_use, nodes, shared

__all__ = ["nodes", "shared", "yard"]  # fixtures

pytestmark = pytest.mark.long


def test_a_master_without_tls_is_told(nodes: RayNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes its time, and then ends the driver."""
    monkeypatch.delenv("RAY_USE_TLS")
    with pytest.raises(NetworkError, match="cannot be reached"), on_ray(nodes.address):
        pass


def test_the_driver_is_killed(nodes: RayNodes, yard: Yard, session_mark: bytes) -> None:
    """Ray ends its actors; another driver has other ones."""
    said: list[str] = []
    with on_ray(nodes.address, lambda who, what: said.append(f"{who}: {what}")) as on:
        run = Watched(on, yard.path(), workers=3)
        before = run.hosts(3, set())
        os.kill(driver(session_mark), signal.SIGKILL)
        assert run.hosts(3, before - {"master"})
        nodes.gate.unlink()
        found = run.run.result()
    assert_same(found, yard.undisturbed(TASK, **SETTINGS))
    assert {event["host"] for event in events(run.out, "host_lost")} == before - {"master"}
    assert any("its driver has ended" in each for each in said), said
    told = [event["why"] for event in events(run.out, "connection") if event["peer"] == "cluster"]
    assert any("its driver has ended" in each for each in told), told


def driver(mark: bytes) -> int:
    (found,) = (pid for pid in processes(mark) if "lockstep.cluster.ray.driver" in describe(pid))
    return found


def test_the_head_is_killed(monkeypatch: pytest.MonkeyPatch, yard: Yard) -> None:
    """The driver and all nodes follow it; agents need nothing of Ray, and go on to the job's end.

    (This cluster is without TLS.)
    """
    said: list[str] = []
    with contextlib.closing(RayNodes(3, PATIENCE)) as nodes, in_use(nodes, monkeypatch):
        with on_ray(nodes.address, lambda who, what: said.append(f"{who}: {what}")) as on:
            run = Watched(on, yard.path(), workers=3)
            run.hosts(3, set())
            nodes.kill_head()
            until(lambda: said, LIMIT, "that the user is told")
            until(lambda: not nodes.found("raylet/raylet"), LIMIT, "that Ray is gone")
            nodes.gate.unlink()
            found = run.run.result()
        nodes.await_end([])
    assert_same(found, yard.undisturbed(TASK, **SETTINGS))
    assert not events(run.out, "host_lost")
    assert "is lost: its driver has ended" in said[0]
    assert "the job goes on with the hosts that it has" in said[0]
