"""Sampling: from a step to the samples of its shards. Pure: the same in every process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

NAMED = 16
"""How many samples a message names."""
Part = tuple[int, int]
"""`(samples, shards)`: what one owner has, and how many shards are made of it."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The division of a training set into data epochs, steps and shards.

    The last step of a data epoch holds what is left over, unless `drop_last` leaves that out: it
    may be short, and then its shards differ by at most one sample, and some may be empty. Where
    the set lies in parts that stay apart, each step takes from every part in proportion, and may
    have a few samples more or fewer.
    """

    samples: int
    batch_size: int
    shards: int
    seed: int
    parts: tuple[Part, ...] = ()
    """The set's parts, one after the other; none: it is one."""
    shuffle: bool = True
    """Whether each data epoch has an order of its own, drawn from the seed."""
    drop_last: bool = False
    """Whether a short last batch is left out."""

    @cached_property
    def all_parts(self) -> tuple[Part, ...]:
        """The parts, or the one."""
        return self.parts or ((self.samples, self.shards),)

    @cached_property
    def steps_per_epoch(self) -> int:
        return steps_in_epoch(self.samples, self.batch_size, drop_last=self.drop_last)

    def data_epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether `step` is the last of its data epoch."""
        return (step + 1) % self.steps_per_epoch == 0

    def batch_span(self, step: int) -> tuple[int, int]:
        """Where the step's batch starts and stops in its data epoch's order, were it all one."""
        start = (step % self.steps_per_epoch) * self.batch_size
        return start, min(start + self.batch_size, self.samples)

    def batch_samples(self, step: int) -> int:
        """N: how many samples the step has."""
        return sum(stop - start for start, stop in self._spans(step))

    def shard_span(self, step: int, shard: int) -> tuple[int, int]:
        """Where the shard starts and stops in its data epoch's order."""
        return self._spans(step)[shard]

    def weights(self, step: int) -> tuple[float, ...]:
        """Each shard's share n / N of the step's samples."""
        return _weights(self._spans(step))

    def active(self, step: int) -> tuple[int, ...]:
        """The shards that have samples."""
        return _active(self._spans(step))

    def _spans(self, step: int) -> Spans:
        return _spans(self.all_parts, self.samples, *self.batch_span(step))

    def has_lone_sample(self, *, first_only: bool) -> bool:
        """Whether a shard has one sample alone: in the first batch, or else in the last one too."""
        steps = (0,) if first_only else (0, self.steps_per_epoch - 1)
        return any(stop - start == 1 for step in steps for start, stop in self._spans(step))


def steps_in_epoch(samples: int, batch_size: int, *, drop_last: bool) -> int:
    """The steps of a data epoch."""
    return samples // batch_size if drop_last else math.ceil(samples / batch_size)


Spans = tuple[tuple[int, int], ...]
"""Of each shard, where it starts and stops in the data epoch's order."""


@lru_cache(maxsize=64)
def _spans(parts: tuple[Part, ...], total: int, start: int, stop: int) -> Spans:
    """The shards of a step that takes `start:stop` of `total`: of each part the same fraction."""
    found: list[tuple[int, int]] = []
    before = 0
    for samples, shards in parts:
        first, last = samples * start // total, samples * stop // total
        edges = [before + first + (last - first) * n // shards for n in range(shards + 1)]
        found += pairwise(edges)
        before += samples
    return tuple(found)


@lru_cache(maxsize=64)
def _weights(spans: Spans) -> tuple[float, ...]:
    total = sum(stop - start for start, stop in spans)
    return tuple((stop - start) / total for start, stop in spans)


@lru_cache(maxsize=64)
def _active(spans: Spans) -> tuple[int, ...]:
    return tuple(shard for shard, (start, stop) in enumerate(spans) if stop > start)


def describe_samples(indices: Sequence[int]) -> str:
    """The samples of a batch for an error's message: the first of them."""
    return ", ".join(map(str, indices[:NAMED])) + (", …" if len(indices) > NAMED else "")


def home_shards(shards: int, workers: int, rank: int) -> range:
    """The shards that the worker of this rank computes: consecutive, as even as can be."""
    return range(-(-shards * rank // workers), -(-shards * (rank + 1) // workers))
