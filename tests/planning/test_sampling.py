"""Who gets which samples, in what order, under which seeds, and how they are fetched."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lockstep.data.fetching import TensorRows
from lockstep.data.loader import FetchTimes, wants_loaders
from lockstep.data.sample_order import SampleOrder
from lockstep.planning.sampling import Sampling, home_shards
from lockstep.system import seeding as seeds
from tests.support import reference_loop as reference

# Sampling.

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


@given(st.integers(1, 64), st.data())
def test_home_shards_partition_the_shards(shards: int, data: st.DataObject) -> None:
    workers = data.draw(st.integers(1, shards))
    parts = [home_shards(shards, workers, rank) for rank in range(workers)]
    assert [shard for part in parts for shard in part] == list(range(shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# Seeds.


def test_seeds_are_what_they_have_always_been() -> None:
    """A change here changes the bits of every run that there is."""
    assert seeds.derive(0, "order", 0) == 3471081512423777433
    assert seeds.derive(3, "shard", 12, 5) == 2912888587245357034
    assert seeds.derive(3, "sample", -1, 7) == 6966365985986415199


@given(st.integers(0, 2**64), st.lists(st.integers(-1, 2**40), max_size=3))
def test_seeds_are_63_bits_and_documented(seed: int, numbers: list[int]) -> None:
    value = seeds.derive(seed, "shard", *numbers)
    assert 0 <= value < 2**63
    assert value == reference.derive(seed, "shard", *numbers)


def test_seeds_of_near_numbers_differ() -> None:
    found = {seeds.derive(0, "shard", step, shard) for step in range(50) for shard in range(50)}
    assert len(found) == 2500
    assert seeds.derive(0, "shard", 1, 11) != seeds.derive(0, "shard", 11, 1)


# Fetching.


def test_batches_fetched_together_are_those_fetched_alone_and_aligned() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = TensorRows((torch.randn(50, 7, generator=generator), torch.arange(50)))
    wanted = [np.array([3, 1, 4]), np.array([15]), np.arange(20, 33)]
    together = rows.several(wanted)
    for indices, batch in zip(wanted, together, strict=True):
        alone = rows(0, indices)
        for mine, theirs in zip(batch, alone, strict=True):
            assert torch.equal(mine, theirs)
            assert mine.data_ptr() % 64 == 0


def test_large_batches_are_fetched_one_by_one() -> None:
    rows = TensorRows((torch.zeros(4, 1 << 16),))
    assert rows.ahead(8) == 1
    assert rows.ahead(1) > 1


def test_one_slow_fetch_does_not_move_loading_to_another_process() -> None:
    times = FetchTimes(each=[(0.2, 0.01), *[(0.0002, 0.0002)] * 7])
    assert not wants_loaders(times, compute_seconds=0.1, spare_cores=0)[0]
    waiting = FetchTimes(each=[(0.02, 0.001)] * 8)
    assert wants_loaders(waiting, compute_seconds=0.1, spare_cores=0)[0]
