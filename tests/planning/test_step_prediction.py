"""The planner's decisions, on profiles that are made up: what is predicted, what is chosen, why."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.errors import ResourceError
from lockstep.planning.candidates import Candidate, Host, Link, candidates
from lockstep.planning.job_profile import (
    JobProfile,
    Measurement,
    ShardTime,
    StateMemory,
    interpolate,
    shard_sizes,
)
from lockstep.planning.ranking import Ranked, check_fits, choose, close, rank
from lockstep.planning.step_prediction import Prediction, Work, predict

MIB = 1 << 20
GIGABIT, SLOW = Link(latency=2e-4, rate=118e6), Link(latency=1e-3, rate=1e6)


def measurement(workers: int, shard: float, **fields: float) -> Measurement:
    defaults = {
        "sum_seconds": 1e-4, "optimizer_seconds": 4e-4, "rest_seconds": 5e-5, "copy_rate": 1e10,
    }  # fmt: skip
    values = {**defaults, **fields}
    return Measurement(
        workers=workers,
        shards=(ShardTime(samples=16, seconds=shard),),
        own=ShardTime(samples=16, seconds=shard),
        traced=False,
        sum_seconds=values["sum_seconds"] / workers,
        optimizer_seconds=values["optimizer_seconds"] / workers,
        rest_seconds=values["rest_seconds"],
        steps=10,
        copy_rate=values["copy_rate"],
        worker_bytes=50 * MIB,
    )


def profile(most: int, shard: float = 0.01, slower: float = 1.0, slot: int = MIB) -> JobProfile:
    """`slower`: by how much a shard takes longer when all cores are busy."""
    return JobProfile(
        alone=measurement(1, shard),
        busy=measurement(most, shard * slower),
        memory=StateMemory(parameters=slot, optimizer=2 * slot, state=3 * slot, slot=slot, slots=8),
    )


def host(name: str = "a", most: int = 4, memory: int = 1 << 40, link: Link | None = None,
         **fields: float) -> Host:  # fmt: skip
    made = profile(most, **fields)  # type: ignore[arg-type]
    return Host(name=name, most_workers=most, memory=memory, profile=made, link=link)


def ranked(hosts: list[Host], work: Work, workers: int | None = None) -> list[Prediction]:
    return rank([predict(each, hosts, work) for each in candidates(hosts, work.shards, workers)])


WORK = Work(shards=8, samples=16)


# What is considered.


def test_the_most_workers_come_first_and_never_more_than_shards() -> None:
    found = [each.total for each in candidates([host(most=16)], 4)]
    assert found == [4, 3, 2, 1]


def test_as_many_workers_as_asked() -> None:
    assert candidates([host()], 8, workers=3) == [Candidate(workers={"a": 3})]


def test_all_subsets_with_the_master() -> None:
    hosts = [host("a"), host("b"), host("c")]
    found = candidates(hosts, 8)
    assert {tuple(each.workers) for each in found} == {
        ("a",), ("a", "b"), ("a", "c"), ("a", "b", "c"),
    }  # fmt: skip
    everywhere = candidates(hosts, 8, all_hosts=True)
    assert {tuple(each.workers) for each in everywhere} == {("a", "b", "c")}


@given(
    most=st.lists(st.integers(1, 64), min_size=1, max_size=9),
    shards=st.integers(1, 64),
)
def test_candidates_are_few_distinct_and_possible(most: list[int], shards: int) -> None:
    hosts = [host(f"h{index}", count) for index, count in enumerate(most)]
    found = candidates(hosts, shards)
    assert 1 <= len(found) < 1100
    assert len({tuple(each.workers.items()) for each in found}) == len(found)
    for each in found:
        assert next(iter(each.workers)) == "h0"
        assert each.total <= shards
        assert all(count >= 1 for count in each.workers.values())
        assert all(each.workers[h.name] <= h.most_workers for h in hosts if h.name in each.workers)


# What is predicted.


def test_the_parts_of_a_step_on_one_host() -> None:
    (found,) = [each for each in ranked([host(most=4)], WORK) if each.candidate.total == 4]
    assert found.parts.compute == pytest.approx(2 * 0.01)
    assert found.parts.update == pytest.approx(4e-4 / 4)
    assert found.parts.reduce == pytest.approx(7 * 1e-4 / 4)
    assert found.parts.exchange == 0.0
    assert found.parts.wait == pytest.approx(5e-5)
    assert found.seconds == pytest.approx(0.02 + 1e-4 + 7e-4 / 4 + 5e-5)


def test_a_worker_too_many_waits() -> None:
    """8 shards on 3 workers take as long as on 4 that have 2 each and one more of nobody."""
    three, four = (
        next(each for each in ranked([host(most=4)], WORK) if each.candidate.total == count)
        for count in (3, 4)
    )
    assert three.parts.compute + three.parts.wait == pytest.approx(3 * 0.01 + 5e-5)
    assert four.seconds < three.seconds


def test_where_more_workers_are_slower_fewer_are_chosen() -> None:
    """Memory that is too slow for two cores: each shard takes three times as long."""
    assert ranked([host(most=2, slower=3.0)], WORK)[0].candidate.total == 1
    assert ranked([host(most=2, slower=1.1)], WORK)[0].candidate.total == 2


@given(
    shard=st.floats(1e-5, 1.0),
    slower=st.floats(1.0, 4.0),
    most=st.integers(1, 16),
    shards=st.integers(1, 32),
)
def test_what_is_measured_is_predicted(shard: float, slower: float, most: int, shards: int) -> None:
    """At the ends nothing is interpolated, and in between it is between the two."""
    made = profile(most, shard, slower)
    assert made.shard_seconds(16, most) == pytest.approx(shard * slower)
    if most > 1:
        assert made.shard_seconds(16, 1) == pytest.approx(shard)
    for workers in range(1, most + 1):
        assert 0.99 * shard <= made.shard_seconds(16, workers) <= 1.01 * shard * slower
    for each in ranked(
        [host(most=most, shard=shard, slower=slower)], Work(shards=shards, samples=16)
    ):
        assert each.seconds > 0
        assert min(vars(each.parts).values()) >= 0


@pytest.mark.parametrize(
    ("at", "value"), [(8, 1.0), (12, 1.5), (16, 2.0), (24, 5.0), (32, 8.0), (40, 11.0), (1, 0.125)]
)
def test_interpolation(at: float, value: float) -> None:
    assert interpolate([(8, 1.0), (16, 2.0), (32, 8.0)], at) == pytest.approx(value)
    assert interpolate([(8, 1.0)], at) == pytest.approx(at / 8)


def test_sizes_of_shards() -> None:
    assert shard_sizes(64, 4, 1000, 1) == [16, 8, 32]
    assert shard_sizes(64, 4, 80, 1) == [16, 8, 20]
    assert shard_sizes(10, 4, 10, 1) == [2, 1]
    assert shard_sizes(64, 4, 1000, 2) == [16]
    assert shard_sizes(1, 1, 1, 1) == [1]


# Several hosts.


def test_a_fast_link_is_used_and_a_slow_one_is_not() -> None:
    for link, expected in ((GIGABIT, 2), (SLOW, 1)):
        hosts = [host("a", 2, link=link), host("b", 2, link=link)]
        assert len(ranked(hosts, WORK)[0].candidate.workers) == expected


def test_the_exchange_is_bounded_by_the_slowest_link() -> None:
    hosts = [host("a", 2, link=GIGABIT), host("b", 2, link=SLOW)]
    both = predict(Candidate(workers={"a": 2, "b": 2}), hosts, WORK)
    assert both.parts.exchange == pytest.approx(SLOW.latency + MIB / SLOW.rate)


def test_compression_makes_the_exchange_shorter() -> None:
    hosts = [host("a", 2, link=SLOW), host("b", 2, link=SLOW)]
    both = Candidate(workers={"a": 2, "b": 2})
    full = predict(both, hosts, WORK).parts.exchange
    small = predict(both, hosts, Work(shards=8, samples=16, groups=2, compression="int8"))
    assert small.parts.exchange < 0.3 * full


def test_more_hosts_never_exchange_less_than_a_ring() -> None:
    hosts = [host(name, 1, link=GIGABIT) for name in "abcd"]
    four = predict(Candidate(workers=dict.fromkeys("abcd", 1)), hosts, WORK)
    ring = 2 * 3 / 4 * MIB / GIGABIT.rate
    assert four.parts.exchange == pytest.approx(2 * GIGABIT.latency + ring)


def test_a_slow_host_is_left_out() -> None:
    hosts = [host("a", 2, link=GIGABIT), host("b", 2, shard=0.1, link=GIGABIT)]
    assert tuple(ranked(hosts, WORK)[0].candidate.workers) == ("a",)


# Memory.


def test_less_memory_fewer_workers() -> None:
    shared = 2 * 3 * MIB + 8 * MIB
    small = host(most=4, memory=shared + 2 * 50 * MIB)
    found = ranked([small], WORK)
    assert found[0].candidate.total == 2
    rejected = [each for each in found if not each.fits]
    assert {each.candidate.total for each in rejected} == {3, 4}
    assert rejected[0].missing == {"a": 50 * MIB}
    assert rejected[0].reason == "does not fit: 50 MiB on a are missing"
    check_fits(found)


def test_a_job_that_fits_nowhere_names_the_nearest_plan_and_the_missing_bytes() -> None:
    found = ranked([host(most=4, memory=40 * MIB)], WORK)
    with pytest.raises(ResourceError) as raised:
        check_fits(found)
    needed = 14 * MIB + 50 * MIB
    assert raised.value.expected == "for the nearest one, 1 worker: 64 MiB on a"
    assert f"a has 40 MiB, {needed - 40 * MIB:,} bytes too few" in raised.value.found


@given(memory=st.integers(0, 1000 * MIB))
def test_nothing_that_does_not_fit_comes_before_what_does(memory: int) -> None:
    found = ranked([host(most=4, memory=memory)], WORK)
    fits = [each.fits for each in found]
    assert fits == sorted(fits, reverse=True)
    assert all(each.memory["a"] <= memory for each in found if each.fits)


# The choice.


def test_near_ties_go_to_more_workers_and_fewer_hosts() -> None:
    """Two workers that share one core's speed gain nothing, and lose next to nothing."""
    found = ranked([host(most=2, slower=2.0)], Work(shards=2, samples=16))
    assert found[0].candidate.total == 2


def test_what_is_measured_counts_more_than_what_is_predicted() -> None:
    two, one = ranked([host(most=2)], WORK)
    assert (two.candidate.total, one.candidate.total) == (2, 1)
    slow, fast = Ranked(prediction=two, measured=0.2), Ranked(prediction=one, measured=0.1)
    assert choose([slow, fast]) is fast
    assert choose([Ranked(prediction=two), Ranked(prediction=one)]).prediction is two
    assert fast.error == pytest.approx(0.1 / one.seconds - 1)


def test_close_ones_are_measured_once_more() -> None:
    two, one = ranked([host(most=2)], WORK)
    assert close([Ranked(prediction=two, measured=0.1), Ranked(prediction=one, measured=0.11)])
    assert not close([Ranked(prediction=two, measured=0.1), Ranked(prediction=one, measured=0.2)])
    assert not close([Ranked(prediction=two, measured=0.1), Ranked(prediction=one)])
    assert not close([Ranked(prediction=two), Ranked(prediction=one)])
    assert choose([Ranked(prediction=one), Ranked(prediction=two)]).prediction is one
