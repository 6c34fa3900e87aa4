"""Which samples a shard of a step is made of: pure functions, the same in every process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The division of a training set into data epochs, steps and shards.

    The last step of a data epoch holds what is left over: it may be short, and then its shards
    differ by at most one sample, and some may be empty.
    """

    samples: int
    batch_size: int
    shards: int
    seed: int

    @cached_property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.samples / self.batch_size)

    def data_epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether `step` is the last of its data epoch."""
        return (step + 1) % self.steps_per_epoch == 0

    def batch_span(self, step: int) -> tuple[int, int]:
        """Where the step's batch starts and stops in its data epoch's order."""
        start = (step % self.steps_per_epoch) * self.batch_size
        return start, min(start + self.batch_size, self.samples)

    def batch_samples(self, step: int) -> int:
        """N: how many samples the step has."""
        start, stop = self.batch_span(step)
        return stop - start

    def shard_span(self, step: int, shard: int) -> tuple[int, int]:
        """Where the shard starts and stops in its data epoch's order."""
        start, stop = self.batch_span(step)
        edges = _edges(stop - start, self.shards)
        return start + edges[shard], start + edges[shard + 1]

    def weights(self, step: int) -> tuple[float, ...]:
        """Each shard's share n / N of the step's samples."""
        start, stop = self.batch_span(step)
        return _weights(stop - start, self.shards)

    def active(self, step: int) -> tuple[int, ...]:
        """The shards that have samples."""
        start, stop = self.batch_span(step)
        return _active(stop - start, self.shards)


@lru_cache(maxsize=64)
def _edges(size: int, shards: int) -> tuple[int, ...]:
    return tuple(size * shard // shards for shard in range(shards + 1))


@lru_cache(maxsize=64)
def _weights(size: int, shards: int) -> tuple[float, ...]:
    return tuple((stop - start) / size for start, stop in pairwise(_edges(size, shards)))


@lru_cache(maxsize=64)
def _active(size: int, shards: int) -> tuple[int, ...]:
    weights = _weights(size, shards)
    return tuple(shard for shard in range(shards) if weights[shard])


def home_shards(shards: int, workers: int, rank: int) -> range:
    """The shards that the worker of this rank computes: consecutive, as even as can be."""
    return range(-(-shards * rank // workers), -(-shards * (rank + 1) // workers))
