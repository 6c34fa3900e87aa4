"""A job's profile, measured for real: what it holds, when it is kept, and when it is not used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from lockstep.agent.local_host import LocalHost
from lockstep.agent.profiling import job_digest, profile_job, profile_path, read_profile
from lockstep.api.core_trials import quick_plan
from lockstep.api.planner import decide_alone
from lockstep.errors import ResourceError
from lockstep.job.job import Job
from lockstep.job.run_request import RunRequest
from lockstep.planning.core_split import Facts, divisions
from lockstep.planning.job_profile import JobProfile
from lockstep.system import machine
from tests.support import command
from tests.zoo import ZOO
from tests.zoo.vectors import Vectors


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lockstep" / "profiles"


class Loaded:
    """A host that has loaded a task, with what the planner needs to know."""

    def __init__(self, host: LocalHost, job: Job, cores: int = 2) -> None:
        self.host, self.job = host, job
        self.facts = Facts(train_samples=host.facts["train_samples"], eval_samples=0, cores=cores)
        self.most = divisions(job, self.facts)[0]
        self.plan = quick_plan(job, self.facts, self.most)
        self.path = profile_path(job_digest(host.facts, job, self.plan), self.plan)

    def profile(self, *, all_sizes: bool) -> JobProfile | None:
        return profile_job(self.host, self.plan, self.path, all_sizes=all_sizes)


@pytest.fixture
def blobs() -> Iterator[Loaded]:
    request = RunRequest.of(f"{command.TASKS}:Blobs", None, {"steps": 400})
    with LocalHost.start(request.source, dict(request.given)) as host:
        yield Loaded(host, request.completed(host.loaded()["settings"]))


def test_what_a_profile_holds(blobs: Loaded, cache: Path) -> None:
    found = blobs.profile(all_sizes=True)
    assert found is not None
    assert (found.alone.workers, found.busy.workers) == (1, 2)
    for each in (found.alone, found.busy):
        assert [time.samples for time in each.shards] == sorted({8, 16, each.shards[-1].samples})
        assert all(0 < time.seconds < 1 for time in each.shards)
        assert 0 < each.own.seconds < 1
        assert each.steps > 0
        assert each.optimizer_seconds > 0
        assert 0 < each.worker_bytes < 1 << 31
        assert each.copy_rate > 1e6
    memory = found.memory
    weights = 4 * sum(p.numel() for p in _blobs_model().parameters())
    assert weights <= memory.parameters == memory.optimizer < 2 * weights
    assert memory.buffers > 0
    assert memory.slot >= weights
    assert memory.slots == blobs.most.shards
    (kept,) = cache.glob("*.json")
    assert read_profile(kept) == found
    again = blobs.profile(all_sizes=True)
    assert again == found


def _blobs_model() -> nn.Module:
    from tests.support.named_tasks import Blobs

    return Blobs().model()


def test_what_decides_about_a_profile(blobs: Loaded) -> None:
    def path(job: Job, **facts: object) -> Path:
        return profile_path(job_digest({**blobs.host.facts, **facts}, job, blobs.plan), blobs.plan)

    same = path(blobs.job)
    assert path(blobs.job.replace(out="elsewhere", workers=1, tags=("a",))) == same
    for job in (
        blobs.job.replace(batch_size=32), blobs.job.replace(precision="bf16"),
        blobs.job.replace(trace="never"),
    ):  # fmt: skip
        assert path(job) != same
    assert path(blobs.job, code="another") != same
    assert path(blobs.job, parameters="others") != same


def test_the_best_two_are_measured_and_the_profile_is_used_again(blobs: Loaded) -> None:
    said: list[str] = []
    first = decide_alone(blobs.job, blobs.facts, blobs.host, say=said.append)
    assert said[0] == "measuring what a shard takes"
    assert {"timing 1 worker", "timing 2 workers"} <= set(said)
    assert first.chosen is not None
    assert first.chosen.measured is not None
    assert first.plan.workers == first.chosen.prediction.candidate.total
    assert "ms a step predicted" in first.plan.reasons[0]
    assert len(first.ranked) == 2


def test_a_profile_that_is_cut_short_is_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert read_profile(path) is None
    path.write_text('{"alone": {')
    assert read_profile(path) is None


class Fails(Vectors):
    """Its loss raises an error."""

    def loss(self, model: nn.Module, batch: object) -> torch.Tensor:
        raise ValueError("no loss")


def test_a_job_that_fails_has_no_profile(cache: Path) -> None:
    """The run itself says what is wrong."""
    request = RunRequest.of(Fails(), None, {"steps": 40})
    with LocalHost.start(request.source, dict(request.given)) as host:
        loaded = Loaded(host, request.completed(host.loaded()["settings"]))
        decided = decide_alone(loaded.job, loaded.facts, host)
    assert decided.ranked == ()
    assert decided.plan.workers == 2
    assert not list(cache.glob("*.json"))


def test_too_little_memory(blobs: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs.profile(all_sizes=False)
    monkeypatch.setattr(machine, "available_bytes", lambda: 1 << 20)
    with pytest.raises(ResourceError, match="no plan for this job fits") as raised:
        decide_alone(blobs.job, blobs.facts, blobs.host)
    assert "bytes too few" in raised.value.found
    assert "for the nearest one, 1 worker" in raised.value.expected


@pytest.mark.parametrize("name", ["muon", "clip", "embedding", "cnn", "bf16", "onecycle"])
def test_models_of_all_kinds(name: str) -> None:
    entry = ZOO[name]
    request = RunRequest.of(entry.task, None, entry.settings())
    with LocalHost.start(request.source, dict(request.given)) as host:
        loaded = Loaded(host, request.completed(host.loaded()["settings"]))
        found = loaded.profile(all_sizes=True)
    assert found is not None
    assert found.busy.own.seconds > 0
