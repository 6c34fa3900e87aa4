"""What workers spend their time on is told of every host, and none of it is lost at the end."""

from __future__ import annotations

import platform

import pytest

from lockstep.results.run_history import PHASES
from lockstep.results.run_reader import RunReader
from tests.support.harmed_runs import yard
from tests.support.multi_host_runs import Site, ended_well, site

__all__ = ["site", "yard"]  # fixtures


def test_the_workers_of_two_hosts(site: Site) -> None:
    on = site.agents({"b": 1}, 2)
    result = site.run("cnn", on)
    ended_well(on)
    reader = RunReader(result.folder)
    reader.refresh()
    history = reader.history
    lanes = {tuple(lane) for lane in history.lanes.rows}
    master = history.master
    assert lanes == {(master, 0), (master, 1), ("b", 0)}
    sums = {tuple(lane): dict.fromkeys(PHASES, 0.0) for lane in history.lanes.rows}
    for lane, begun, ended, spent in history.times.rows:
        assert 0 <= begun <= ended
        for phase, seconds in zip(PHASES, spent, strict=True):
            sums[tuple(history.lanes.rows[lane])][phase] += seconds
    for worker in ("0", "1"):
        told, accounted = sums[master, int(worker)], result.times[worker]
        for phase in ("compute", "data", "wait", "evaluate"):
            assert told[phase] == pytest.approx(accounted[phase], abs=0.002)
        both = told["reduce"] + told["exchange"] + told["update"]
        assert both == pytest.approx(accounted["reduce"] + accounted["update"], abs=0.003)
    assert sums["b", 0]["compute"] > 0
    assert history.first is not None
    assert history.first.host == platform.node()
    assert reader.status == "finished"
