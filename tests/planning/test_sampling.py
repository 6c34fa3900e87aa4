"""Sampling: which samples each shard gets, and in what order."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from lockstep.data.sample_order import SampleOrder
from lockstep.planning.sampling import Sampling, home_shards
from tests.support import reference_loop as reference

samplings = st.builds(
    Sampling,
    samples=st.integers(1, 400),
    batch_size=st.integers(1, 90),
    shards=st.integers(1, 20),
    seed=st.integers(0, 2**63),
)


@given(samplings, st.integers(0, 3))
def test_every_sample_once_per_data_epoch(sampling: Sampling, data_epoch: int) -> None:
    order = SampleOrder(sampling)
    first = data_epoch * sampling.steps_per_epoch
    steps = range(first, first + sampling.steps_per_epoch)
    seen = [i for s in steps for v in range(sampling.shards) for i in order.indices(s, v).tolist()]
    assert sorted(seen) == list(range(sampling.samples))
    assert seen == reference.order(sampling.seed, data_epoch, sampling.samples)
    assert {sampling.data_epoch(step) for step in steps} == {data_epoch}
    assert [step for step in steps if sampling.ends_epoch(step)] == [steps[-1]]


@given(samplings, st.integers(0, 2000))
def test_shards_partition_the_batch(sampling: Sampling, step: int) -> None:
    start, stop = sampling.batch_span(step)
    spans = [sampling.shard_span(step, shard) for shard in range(sampling.shards)]
    assert [span[0] for span in spans] == [start, *(span[1] for span in spans[:-1])]
    assert spans[-1][1] == stop
    sizes = [last - first for first, last in spans]
    assert sum(sizes) == sampling.batch_samples(step) == stop - start
    assert sampling.weights(step) == tuple(size / (stop - start) for size in sizes)
    assert sampling.active(step) == tuple(shard for shard, size in enumerate(sizes) if size)
    assert max(sizes) - min(sizes) <= 1
    assert 0 < stop - start <= sampling.batch_size


@given(samplings, st.lists(st.integers(0, 60), max_size=5))
def test_order_does_not_depend_on_what_was_asked_before(
    sampling: Sampling, steps: list[int]
) -> None:
    order = SampleOrder(sampling)
    for step in steps:
        assert order.indices(step, 0).tolist() == SampleOrder(sampling).indices(step, 0).tolist()


@given(samplings, st.integers(0, 3))
def test_without_shuffling_the_order_is_the_sets(sampling: Sampling, data_epoch: int) -> None:
    plain = dataclasses.replace(sampling, shuffle=False)
    order = SampleOrder(plain)
    steps = range(data_epoch * plain.steps_per_epoch, (data_epoch + 1) * plain.steps_per_epoch)
    seen = [i for s in steps for v in range(plain.shards) for i in order.indices(s, v).tolist()]
    assert seen == list(range(sampling.samples))


@given(samplings.filter(lambda each: each.samples >= each.batch_size), st.integers(0, 3))
def test_drop_last_leaves_out_a_short_batch(sampling: Sampling, data_epoch: int) -> None:
    full = dataclasses.replace(sampling, drop_last=True)
    order = SampleOrder(full)
    steps = range(data_epoch * full.steps_per_epoch, (data_epoch + 1) * full.steps_per_epoch)
    assert {full.batch_samples(step) for step in steps} == {sampling.batch_size}
    seen = [i for s in steps for v in range(full.shards) for i in order.indices(s, v).tolist()]
    kept = sampling.samples - sampling.samples % sampling.batch_size
    assert seen == reference.order(sampling.seed, data_epoch, sampling.samples)[:kept]


@given(samplings)
def test_a_lone_sample_is_known_beforehand(sampling: Sampling) -> None:
    spans = [
        sampling.shard_span(step, shard)
        for step in range(sampling.steps_per_epoch)
        for shard in range(sampling.shards)
    ]
    assert sampling.has_lone_sample(first_only=False) == any(b - a == 1 for a, b in spans)


@given(st.integers(1, 64), st.data())
def test_home_shards_partition_the_shards(shards: int, data: st.DataObject) -> None:
    workers = data.draw(st.integers(1, shards))
    parts = [home_shards(shards, workers, rank) for rank in range(workers)]
    assert [shard for part in parts for shard in part] == list(range(shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
