"""Data that stays on its hosts: exact means over all of it, and a loss that nothing makes good."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lockstep
from lockstep.data.sample_order import SampleOrder
from lockstep.errors import DataLostError, JobError, RefusedError
from lockstep.job.faults import Fault
from lockstep.planning.data_partition import (
    DataPart,
    check_open,
    check_same,
    divide,
    held_out_batches,
    parts,
    shard_ranges,
)
from lockstep.planning.sampling import Sampling
from tests.end_to_end.test_same_bits import assert_equals_reference
from tests.support import reference_loop as reference
from tests.support.agents_on_loopback import HELD, KEPT, Agents, Kept
from tests.support.harmed_runs import events, yard
from tests.support.multi_host_runs import Site, ended_well, site

__all__ = ["site", "yard"]  # fixtures

HOSTS = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 20)), min_size=1, max_size=5)


@given(HOSTS, st.integers(0, 10))
def test_every_host_has_shards(hosts: list[tuple[int, int]], more: int) -> None:
    samples = {f"h{place}": each for place, each in enumerate(hosts)}
    holdings = divide(samples, len(hosts) + more)
    assert sum(each.shards for each in holdings) == len(hosts) + more
    assert all(each.shards >= 1 for each in holdings)
    ranges = list(shard_ranges(holdings).values())
    assert [n for each in ranges for n in each] == list(range(len(hosts) + more))


def test_more_samples_more_shards() -> None:
    holdings = divide({"a": (10, 0), "b": (70, 0), "c": (20, 0)}, 13)
    assert [each.shards for each in holdings] == [2, 8, 3]
    with pytest.raises(JobError, match="fewer shards than hosts"):
        divide({"a": (10, 0), "b": (70, 0)}, 1)


@given(HOSTS, st.integers(0, 10), st.data())
def test_every_sample_once_on_its_own_host(
    hosts: list[tuple[int, int]], more: int, data: st.DataObject
) -> None:
    shards, total = len(hosts) + more, sum(train for train, _ in hosts)
    batch_size = data.draw(st.integers(shards, max(shards, total)))
    holdings = divide({f"h{place}": each for place, each in enumerate(hosts)}, shards)
    sampling = Sampling(
        samples=total, batch_size=batch_size, shards=shards, seed=3, parts=parts(holdings)
    )
    epoch = data.draw(st.integers(0, 2))
    steps = [epoch * sampling.steps_per_epoch + n for n in range(sampling.steps_per_epoch)]
    for part, (holding, owned) in enumerate(
        zip(holdings, shard_ranges(holdings).values(), strict=True)
    ):
        order = SampleOrder(sampling, part)
        seen = [n for step in steps for shard in owned for n in order.indices(step, shard).tolist()]
        assert sorted(seen) == list(range(holding.train))
    for step in steps:
        sizes = [
            stop - start for start, stop in map(sampling.shard_span, [step] * shards, range(shards))
        ]
        assert sum(sizes) == sampling.batch_samples(step)
        start, stop = sampling.batch_span(step)
        assert abs(sum(sizes) - (stop - start)) < len(hosts)
        assert sampling.weights(step) == tuple(size / sum(sizes) for size in sizes)


def test_batches_of_every_host() -> None:
    holdings = divide({"a": (9, 5), "b": (9, 0), "c": (9, 4)}, 3)
    assert held_out_batches(holdings, 4) == {"a": range(2), "b": range(2, 2), "c": range(2, 3)}


def test_other_hosts_and_other_data() -> None:
    holdings = divide({"a": (9, 5), "b": (9, 0)}, 3)
    check_same(holdings, {"a": (9, 5), "b": (9, 0)})
    check_same((), {"a": (9, 5)})
    check_open((), "c")
    with pytest.raises(JobError) as raised:
        check_same(holdings, {"a": (8, 5), "c": (9, 0)})
    assert "host a with 9 training" in raised.value.expected
    assert "no host b" in raised.value.found
    assert "no host c" in raised.value.expected
    with pytest.raises(RefusedError, match="host c may not join"):
        check_open(holdings, "c")


# On several hosts.

VITAL: dict[str, Any] = {"batch_size": 20, "shards": 7, "seed": 3, "eval_batch_size": 8}
NAMES = {"master": "", "b": "b", "c": "c"}
SAMPLES = {
    host: (KEPT[name][1] - KEPT[name][0], HELD[name][1] - HELD[name][0])
    for host, name in NAMES.items()
}
HOLDINGS: tuple[DataPart, ...] = divide(SAMPLES, VITAL["shards"])


def run(site: Site, on: Agents, **changes: Any) -> lockstep.Result:
    workers = (on.workers or 1) + sum(on.names.values())
    settings = {**VITAL, "threads": 1, "steps": 15, "data": "local", **changes}
    return lockstep.run(
        "tests.support.agents_on_loopback:Kept",
        on=on,
        workers=workers,
        out=site.yard.path(),
        quiet=True,
        **settings,
    )


def wanted(steps: int = 15) -> reference.Outcome:
    """What a plain loop makes of all samples in one place."""
    held = [(each.train, each.held_out, each.shards) for each in HOLDINGS]
    return reference.train(Kept(whole=True), steps=steps, parts=held, **VITAL)


@pytest.mark.parametrize(
    ("others", "here"),
    [({"b": 1, "c": 1}, 1), pytest.param({"b": 2, "c": 1}, 2, marks=pytest.mark.long)],
)
def test_the_numbers_are_those_of_all_samples_together(
    site: Site, others: dict[str, int], here: int
) -> None:
    """For any number of workers, and though one dies."""
    on = site.agents(others, here)
    fault = Fault(worker_id=-1, host="b", step=4, phase="backward")
    found = run(site, on, faults=(fault,))
    assert_equals_reference(found, wanted())
    assert [event["host"] for event in events(found.folder, "died")] == ["b"]
    ended_well(on)


def test_the_comparison_can_fail() -> None:
    whole = reference.train(Kept(whole=True), steps=15, **VITAL)
    assert whole.file() != wanted().file()


@pytest.mark.long
def test_a_host_is_lost_and_the_run_goes_on_when_it_is_back(site: Site) -> None:
    on = site.agents({"b": 1, "c": 1})
    fault = Fault(worker_id=-1, host="c", step=9, phase="forward", kind="host")
    with pytest.raises(DataLostError, match="host c is lost") as raised:
        run(site, on, faults=(fault,), checkpoint_steps=4)
    assert "step-00000008" in raised.value.fix
    codes = on.wait()
    assert codes["c"] == -9
    folder = raised.value.fix.split("lockstep resume ")[1].split()[0]
    with pytest.raises(JobError, match="every host has a part of the data"):
        lockstep.resume(folder, quiet=True)
    fewer = site.agents({"b": 1})
    with pytest.raises(JobError, match="the run had other hosts") as refused:
        lockstep.resume(folder, on=fewer, quiet=True)
    assert "no host c" in refused.value.found
    again = site.agents({"b": 1, "c": 1})
    found = lockstep.resume(folder, on=again, quiet=True)
    assert_equals_reference(found, wanted())
    ended_well(again)
    with pytest.raises(JobError, match="every host has a part of the data"):
        lockstep.verify(folder)


def test_alone(site: Site) -> None:
    with pytest.raises(JobError, match="every host has a part of the data"):
        lockstep.run(
            "tests.support.agents_on_loopback:Kept",
            data="local",
            workers=1,
            out=site.yard.path(),
            steps=2,
        )
