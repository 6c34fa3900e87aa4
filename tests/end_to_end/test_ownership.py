"""Ownership: the same bits whoever sums and updates what, and whatever dies."""

from __future__ import annotations

from typing import Any

import pytest

import lockstep
from lockstep.job.faults import Fault
from tests.support.harmed_runs import assert_same, events
from tests.support.multi_host_runs import (
    Site,
    check_joining_and_leaving,
    ended_well,
    site,
    slow,
    yard,
)

__all__ = ["site", "slow", "yard"]  # fixtures

SETTINGS: dict[str, dict[str, Any]] = {
    "sharded": {"ownership": "sharded"},
    "servers": {"ownership": "servers", "servers": ["c"]},
}


@pytest.mark.parametrize("kind", [pytest.param("sharded", marks=pytest.mark.long), "servers"])
@pytest.mark.parametrize(
    "name",
    [
        "mixture",  # parameters without gradients in some steps
        pytest.param("clip", marks=pytest.mark.long),
        pytest.param("cnn", marks=pytest.mark.long),
        pytest.param("transformer", marks=pytest.mark.long),
        pytest.param("muon", marks=pytest.mark.long),
        pytest.param("embedding", marks=pytest.mark.long),
        pytest.param("channels-last", marks=pytest.mark.long),
        pytest.param("buffers", marks=pytest.mark.long),
    ],
)
def test_same_bits(site: Site, kind: str, name: str) -> None:
    on = site.agents({"b": 1, "c": 2}, 2)
    site.check(name, on, **SETTINGS[kind])
    ended_well(on)


@pytest.mark.long
@pytest.mark.parametrize("kind", SETTINGS)
def test_sparse_gradients(site: Site, kind: str) -> None:
    """Tables are updated on every host; only touched rows travel."""
    settings: dict[str, Any] = {
        "args": {"optimizer": "SparseAdam", "use": "two losses"}, "batch_size": 48, "steps": 8,
        "seed": 3, "shards": 4, "threads": 1, "quiet": True,
    }  # fmt: skip
    on = site.agents({"b": 1, "c": 1}, 2)
    task = "tests.collectives.test_sparse_gradients:Sparse"
    workers = 4 if kind == "sharded" else 3
    found = lockstep.run(
        task, on=on, workers=workers, out=site.yard.path(), **SETTINGS[kind], **settings
    )
    wanted = lockstep.run(task, workers=1, out=site.yard.path(), **settings)
    assert_same(found, wanted)
    ended_well(on)


# Deaths.


@pytest.mark.long
@pytest.mark.parametrize("phase", ["exchange", "return"])
def test_a_host_dies_that_sums_for_all(site: Site, phase: str) -> None:
    on = site.agents({"b": 1, "c": 1, "d": 1}, 1)
    faults = (
        Fault(worker_id=0, host="c", step=5, phase=phase, kind="host"),
        Fault(worker_id=0, host="b", step=9, phase=phase),  # and a worker
    )
    found = site.check("clip", on, steps=16, faults=faults)
    assert [event["host"] for event in events(found.folder, "host_lost")] == ["c"]
    died = [(event["host"], event["step"]) for event in events(found.folder, "died")]
    assert ("b", 9) in died
    ended_well(on, "c")


@pytest.mark.long
@pytest.mark.parametrize("kind", [pytest.param("sharded", marks=pytest.mark.long), "servers"])
def test_a_part_of_the_state_is_lost(site: Site, kind: str) -> None:
    """With its host, or in the middle of an update: all go back to the master's base."""
    on = site.agents({"b": 1, "c": 1, "d": 1}, 1)
    faults = (
        # A worker: its host goes on by itself. Beside a server it has two, and one may do all.
        Fault(worker_id=-1, host="d", step=7, phase="forward"),
        Fault(worker_id=0, host="c", step=11, phase="update_end"),
        Fault(worker_id=0, host="b", step=14, phase="return"),
        Fault(worker_id=0, host="c", step=18, phase="return", kind="host"),
    )
    found = site.check("channels-last", on, steps=24, faults=faults, **SETTINGS[kind])
    assert [event["host"] for event in events(found.folder, "host_lost")] == ["c"]
    died = {(event["host"], event["step"]) for event in events(found.folder, "died")}
    assert died >= {(fault.host, fault.step) for fault in faults if fault.kind == "kill"}
    ended_well(on, "c")


@pytest.mark.long
@pytest.mark.parametrize("kind", SETTINGS)
def test_hosts_join_and_leave(site: Site, slow: None, kind: str) -> None:
    """The base is brought up to date before anybody is let in; a checkpoint has all parts."""
    check_joining_and_leaving(site, {"b": 1, "c": 1}, "d", "c", **SETTINGS[kind])
