"""Sample order: each epoch's permutation, a pure function of the seed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from lockstep.planning.sampling import Sampling
from lockstep.system.seeding import derive


class SampleOrder:
    """The training set's order in each data epoch: `torch.randperm` under the epoch's seed.

    Without shuffling it is that of the set. Where the set lies in parts, each has an order of
    its own.
    """

    def __init__(self, sampling: Sampling, part: int = 0) -> None:
        """`part`: the one whose samples are counted from 0."""
        self.sampling = sampling
        self._first = sum(samples for samples, _ in sampling.all_parts[:part])
        self._epoch = -1
        self._order: Indices = np.empty(0, np.int64)

    def indices(self, step: int, shard: int) -> Indices:
        """The samples of a shard of a step."""
        epoch = self.sampling.data_epoch(step)
        if epoch != self._epoch:
            self._order, self._epoch = self._draw(epoch), epoch
        start, stop = self.sampling.shard_span(step, shard)
        return self._order[start:stop]

    def _draw(self, epoch: int) -> Indices:
        if not self.sampling.shuffle:
            return np.arange(self.sampling.samples) - self._first
        drawn, before = [], -self._first
        for part, (samples, _) in enumerate(self.sampling.all_parts):
            which = (epoch, part) if self.sampling.parts else (epoch,)
            generator = torch.Generator().manual_seed(derive(self.sampling.seed, "order", *which))
            drawn.append(before + torch.randperm(samples, generator=generator).numpy())
            before += samples
        return np.concatenate(drawn) if len(drawn) > 1 else drawn[0]


Indices = npt.NDArray[np.int64]
