"""A job on several hosts is planned: who takes part, and that no bit depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.api import training
from lockstep.coordinator.rendezvous import Rendezvous
from lockstep.planning.candidates import Link
from lockstep.planning.job_profile import JobProfile
from lockstep.results.event_schema import Planned, parse_event
from tests.support.harmed_runs import yard
from tests.support.multi_host_runs import Site, ended_well, site

__all__ = ["site", "yard"]  # fixtures


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def planned(site: Site, others: dict[str, int], **changes: Any) -> tuple[lockstep.Result, Planned]:
    on = site.agents(others)
    settings = site.settings("mlp", hosts="planned", steps=40, **changes)
    found = lockstep.run("tests.zoo:named", on=on, out=site.yard.path(), quiet=True, **settings)
    ended_well(on)
    lines = (found.folder / "events.jsonl").read_bytes().splitlines()
    (event,) = [each for each in map(parse_event, lines) if isinstance(each, Planned)]
    return found, event


def link_of(monkeypatch: pytest.MonkeyPatch, link: Link) -> list[Link]:
    """Pretend that links are like this one; they are measured all the same."""
    measured: list[Link] = []
    measure = Rendezvous.measure_link

    def measure_link(self: Rendezvous, name: str) -> Link:
        measured.append(measure(self, name))
        return link

    monkeypatch.setattr(Rendezvous, "measure_link", measure_link)
    return measured


def test_a_host_on_a_slow_link_is_left_out(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = link_of(monkeypatch, Link(latency=0.5, rate=1e5))
    found, event = planned(site, {"b": 1})
    assert found.fingerprint == site.alone("mlp", steps=40).fingerprint
    assert (event.considered, event.workers, found.workers) == (2, 1, 1)
    assert len(event.memory) == 1
    (link,) = measured
    assert 0 < link.latency < 1
    assert link.rate > 1e6


def test_a_host_on_a_fast_link_takes_part(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    link_of(monkeypatch, Link(latency=0.0, rate=1e12))
    monkeypatch.setattr(JobProfile, "rest_seconds", lambda *_: 0.0)
    monkeypatch.setattr(JobProfile, "shard_seconds", lambda *_: 0.01)
    found, event = planned(site, {"b": 1})
    assert found.fingerprint == site.alone("mlp", steps=40).fingerprint
    assert (event.considered, event.workers, found.workers) == (2, 2, 2)
    assert len(event.memory) == 2


def test_the_plan_shows_all_choices_and_trains_nothing(site: Site) -> None:
    on = site.agents({"b": 1})
    explanation = training.explain("tests.zoo:named", on=on, **site.settings("mlp", steps=40))
    ended_well(on)
    choices = [len(each.prediction.candidate.workers) for each in explanation.decision.ranked]
    assert sorted(choices) == [1, 2]
    assert explanation.decision.plan.workers == 2, "all hosts take part, unless asked otherwise"
    assert any(each.prediction.parts.exchange > 0 for each in explanation.decision.ranked)
