"""The division of the cores: what changes numbers never depends on them."""

from __future__ import annotations

import pytest

from lockstep.errors import JobError
from lockstep.job.job import Job
from lockstep.planning.core_split import Division, Facts, default_shards, divisions
from lockstep.planning.host_split import decompose_over_hosts


def facts(cores: int) -> Facts:
    return Facts(train_samples=1000, eval_samples=0, cores=cores)


@pytest.mark.parametrize(
    ("batch_size", "shards"),
    [(1, 1), (2, 2), (3, 3), (4, 4), (64, 4), (127, 4), (128, 8), (100_000, 8)],
)
def test_default_shards(batch_size: int, shards: int) -> None:
    assert default_shards(batch_size) == shards


@pytest.mark.parametrize("cores", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("batch_size", [None, 8, 64, 256])
def test_shards_and_threads_do_not_depend_on_the_cores(cores: int, batch_size: int | None) -> None:
    job = Job(task="t", batch_size=batch_size)
    found = divisions(job, facts(cores))
    assert {(each.shards, each.threads) for each in found} == {
        (default_shards(batch_size or 64), 1)
    }
    assert found[0].workers == min(cores, default_shards(batch_size or 64))
    assert found[-1].workers == 1


def test_nor_on_the_hosts() -> None:
    job = Job(task="t", batch_size=64)
    for capacities in ({"a": 1}, {"a": 2, "b": 1}, {"a": 16, "b": 16, "c": 16}):
        samples = dict.fromkeys(capacities, (1000, 0))
        plan = decompose_over_hosts(job, facts(2), capacities, samples)
        assert (plan.shards, plan.threads) == (4, 1)
        assert plan.workers == min(sum(capacities.values()), 4)


def test_threads_as_asked() -> None:
    found = divisions(Job(task="t", threads=4, batch_size=256), facts(8))
    assert found[0] == Division(workers=2, threads=4, shards=8)


@pytest.mark.parametrize("name", ["workers", "max_workers"])
def test_more_workers_than_shards(name: str) -> None:
    with pytest.raises(JobError, match="more than there are shards") as raised:
        divisions(Job(task="t").replace(**{name: 5}), facts(8))
    assert raised.value.expected == "at most 4: a batch of 64 is cut into 4 shards"
    assert "set shards = 5" in raised.value.fix
