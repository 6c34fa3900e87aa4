"""Teams: who computes what, for any number of workers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lockstep
from lockstep.errors import JobError
from lockstep.planning.assignment import assign
from lockstep.planning.candidates import Candidate, candidates
from lockstep.planning.core_split import Facts, divisions
from lockstep.planning.host_role import HostRole
from lockstep.planning.ownership import ownership_of
from lockstep.planning.plan import Plan, decompose
from lockstep.planning.step_prediction import Work, predict
from lockstep.planning.teams import describe_teams, slices_of, team_count, team_of, team_ranks
from tests.planning.test_step_prediction import host

FACTS = Facts(train_samples=100, eval_samples=0, cores=4)


def plan_of(**settings: object) -> Plan:
    job = lockstep.Job(task="mnist", **{"batch_size": 12, "shards": 3, "slices": 4, **settings})  # type: ignore[arg-type]
    return decompose(job, FACTS, divisions(job, FACTS)[0])


@given(workers=st.integers(1, 20), team=st.integers(1, 8))
def test_every_worker_is_in_one_team(workers: int, team: int) -> None:
    count = team_count(workers, team)
    ranks = [team_ranks(workers, team, index) for index in range(count)]
    assert [rank for run in ranks for rank in run] == list(range(workers))
    assert all(team_of(rank, team) == index for index, run in enumerate(ranks) for rank in run)
    assert all(len(run) == team for run in ranks[: workers // team])


@given(slices=st.integers(1, 20), data=st.data())
def test_every_slice_is_one_members(slices: int, data: st.DataObject) -> None:
    members = data.draw(st.integers(1, slices))
    runs = [slices_of(slices, members, position) for position in range(members)]
    assert [number for run in runs for number in run] == list(range(slices))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
    assert all(runs)


def test_members_of_a_team_have_the_same_shards() -> None:
    plan = plan_of(workers=5, team=2)
    ownership = ownership_of(plan.ownership, plan.servers, plan.compression, plan.local_steps)
    made = [
        assign(
            HostRole.alone("", plan, ownership), (3, 5, 6, 8, 9), rank,
            epoch=1, step=0, todo=(), refresh=False, loaders=True, ahead_from=0, team=plan.team,
        )
        for rank in range(5)
    ]  # fmt: skip
    assert [each.teammates for each in made] == [(3, 5), (3, 5), (6, 8), (6, 8), (9,)]
    assert [each.shards for each in made] == [(0,), (0,), (1,), (1,), (2,)]
    assert {each.teams for each in made} == {3}
    assert describe_teams(made[0].worker_ids, 2) == "3 teams of workers: 3 + 5, 6 + 8, 9"


def test_there_may_be_a_team_for_each_shard() -> None:
    plan = plan_of(workers=6, team=2)
    assert (plan.most_workers, plan.max_workers) == (6, 6)
    assert any("1 to 6 workers" in reason for reason in plan.reasons)
    with pytest.raises(JobError, match="more than there are shards"):
        plan_of(workers=None, max_workers=7, team=2)
    resized = plan.resized(8, 4)
    assert (resized.team, resized.workers, resized.max_workers) == (4, 8, 8)
    assert plan.resized(1, None).workers == 1
    for workers, team in ((3, 4), (8, 5), (13, 4)):
        with pytest.raises(JobError):
            plan.resized(workers, team)
    assert Plan.from_message(plan.to_message()) == plan


def test_no_fewer_workers_than_a_team_are_considered() -> None:
    job = lockstep.Job(task="mnist", batch_size=12, shards=1, slices=4, team=2)
    assert [each.workers for each in divisions(job, FACTS)] == [2]
    assert [each.workers for each in divisions(job, replace(FACTS, cores=1))] == [2]
    job = job.replace(shards=3)
    assert [each.workers for each in divisions(job, FACTS)] == [4, 3, 2]
    assert [each.total for each in candidates([host()], 3, team=2)] == [4, 3, 2]


def test_a_shard_is_predicted_to_be_divided_among_a_team() -> None:
    """One shard, which two workers without a team cannot share."""
    pair, alone = Candidate(workers={"a": 2}), Candidate(workers={"a": 1})
    one = predict(alone, [host()], Work(shards=1, samples=16)).parts
    two = predict(pair, [host()], Work(shards=1, samples=16, team=2)).parts
    assert two.compute + two.wait < 0.6 * (one.compute + one.wait)
