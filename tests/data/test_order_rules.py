"""Weighted and length-grouped sampling: the draws of PyTorch's and transformers' samplers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset, WeightedRandomSampler

from lockstep.data.order_rules import ByLength, ByWeight, repeats_in, rule_of
from lockstep.data.sample_order import SampleOrder
from lockstep.errors import DataError
from lockstep.job.task import Task
from lockstep.planning.sampling import Sampling
from tests.support import reference_loop as reference


class Said(Task):
    """Says these of its samples."""

    def __init__(self, weights: Any = None, lengths: Any = None) -> None:
        self.weights, self.lengths = weights, lengths

    def sample_weights(self, data: Any) -> Any:
        return self.weights

    def sample_lengths(self, data: Any) -> Any:
        return self.lengths


def rule(samples: int = 3, *, shuffle: bool = True, **said: Any) -> Any:
    return rule_of(Said(**said), TensorDataset(torch.zeros(samples)), samples, shuffle=shuffle)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=200).filter(lambda each: sum(each) > 1e-3),
    st.integers(0, 2**62),
)
def test_the_draws_of_weighted_random_sampler(weights: list[float], seed: int) -> None:
    size = len(weights)
    wanted = list(WeightedRandomSampler(weights, size, generator=generator(seed)))
    assert ByWeight(np.array(weights)).draw(generator(seed), 8).tolist() == wanted


def test_classes_are_drawn_by_their_weights() -> None:
    labels = torch.tensor([0] * 900 + [1] * 100)
    found = rule(1000, weights=(1 / torch.bincount(labels))[labels])
    counts = torch.zeros(2)
    for seed in range(100):
        counts += torch.bincount(labels[found.draw(generator(seed), 32)], minlength=2)
    share = counts[1] / counts.sum()  # of 100,000 draws: a standard deviation of 0.0016
    assert share == pytest.approx(0.5, abs=0.008)


def test_a_weight_of_zero_is_never_drawn() -> None:
    found = rule(4, weights=[0, 1, 0, 0])
    assert set(found.draw(generator(0), 2).tolist()) == {1}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(1, 20), st.integers(0))
def test_the_order_of_length_grouped_sampler(lengths: list[int], batch: int, seed: int) -> None:
    trainer = pytest.importorskip("transformers.trainer_pt_utils", reason="needs transformers")
    seed %= 2**62
    found = ByLength(np.array(lengths, np.float64)).draw(generator(seed), batch)
    wanted = trainer.get_length_grouped_indices(lengths, batch, generator=generator(seed))
    assert found.tolist() == wanted


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(1, 20))
def test_each_comes_once_and_the_longest_first(lengths: list[int], batch: int) -> None:
    found = ByLength(np.array(lengths, np.float64)).draw(generator(3), batch).tolist()
    assert sorted(found) == list(range(len(lengths)))
    assert lengths[found[0]] == max(lengths)


def test_little_is_padded() -> None:
    lengths = torch.randint(1, 513, (4000,), generator=generator(1))
    orders = {"grouped": rule(4000, lengths=lengths).draw(generator(2), 32), "random": None}
    orders["random"] = torch.randperm(4000, generator=generator(2)).numpy()
    padded = {
        name: sum(int(lengths[order[i : i + 32]].max()) * 32 for i in range(0, 4000, 32))
        for name, order in orders.items()
    }
    assert padded["grouped"] < 1.05 * int(lengths.sum()) < padded["random"] / 1.5


@given(st.lists(st.integers(0, 9), max_size=40))
def test_repeats(order: list[int]) -> None:
    wanted = [order[:place].count(sample) for place, sample in enumerate(order)]
    found = repeats_in(np.array(order, np.int64))
    assert wanted == ([0] * len(order) if found is None else found.tolist())


def test_a_pure_function_of_seed_and_data_epoch() -> None:
    sampling = Sampling(samples=50, batch_size=8, shards=3, seed=9)
    weights = np.linspace(0, 1, 50)
    asked = SampleOrder(sampling, rule=ByWeight(weights))
    for step in (20, 3, 9, 3):
        drawn = generator(reference.derive(9, "order", step // 7))
        wanted = list(WeightedRandomSampler(weights.tolist(), 50, generator=drawn))
        start, stop = sampling.shard_span(step, 1)
        assert asked.indices(step, 1).tolist() == wanted[start:stop]
        repeats = [wanted[:place].count(wanted[place]) for place in range(start, stop)]
        assert asked.repeats(step, 1).tolist() == repeats  # type: ignore[union-attr]


def test_a_part_of_the_data_has_its_own() -> None:
    """With local data: the host's rule is of its own samples, and others' are not touched."""
    sampling = Sampling(samples=60, batch_size=12, shards=3, seed=1, parts=((20, 1), (40, 2)))
    weights = np.zeros(40)
    weights[7] = 1.0
    order = SampleOrder(sampling, 1, ByWeight(weights))
    for step in range(5):
        for shard in (1, 2):
            assert set(order.indices(step, shard).tolist()) == {7}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"weights": [1.0, -1.0, 2.0]}, "0 or more, and finite\n.*-1.0 for sample 1"),
        ({"weights": [1.0, 1.0, float("nan")]}, "nan for sample 2"),
        ({"weights": torch.tensor([1.0, torch.inf, 1.0])}, "inf for sample 1"),
        ({"weights": [0, 0, 0]}, "a sum above 0, and finite\n.*0.0"),
        ({"weights": [1e308, 1e308, 1e308]}, "a sum above 0, and finite\n.*inf"),
        ({"weights": [1.0, 2.0]}, r"one number per sample\n.*\[3\]\n.*\[2\], for 3 samples"),
        ({"weights": [[1.0, 2.0, 3.0]]}, r"\[1, 3\], for 3 samples"),
        ({"weights": 1.0}, r"one number per sample\n"),
        ({"weights": ["a", "b", "c"]}, "does not return numbers"),
        ({"weights": [1.0, 1.0, 1.0], "lengths": [1, 1, 1]}, "both weights and lengths"),
        ({"weights": [1.0, 1.0, 1.0], "shuffle": False}, "shuffle is off"),
        ({"lengths": [1, -2, 3]}, r"sample_lengths\(\) has numbers that are none"),
        ({"lengths": [1, 2]}, r"\[2\], for 3 samples"),
    ],
)
def test_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        rule(**said)


def test_no_rule() -> None:
    assert rule() is None
