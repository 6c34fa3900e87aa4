"""Sample order: which samples a data epoch has, in which order: a pure function of the seed."""

from __future__ import annotations

import numpy as np
import torch

from lockstep.data.order_rules import Indices, OrderRule, repeats_in
from lockstep.planning.sampling import Sampling
from lockstep.system.seeding import derive


class SampleOrder:
    """The training set's order in each data epoch: `torch.randperm` under the epoch's seed, or
    what the task's rule draws under it.

    Without shuffling it is that of the set. Where the set lies in parts, each has an order of
    its own.
    """

    def __init__(self, sampling: Sampling, part: int = 0, rule: OrderRule | None = None) -> None:
        """`part`: the one whose samples are counted from 0, and whose rule it is."""
        self.sampling, self.rule, self._part = sampling, rule, part
        self._first = sum(samples for samples, _ in sampling.all_parts[:part])
        self._epoch = -1
        self._order: Indices = np.empty(0, np.int64)
        self._repeats: Indices | None = None

    def indices(self, step: int, shard: int) -> Indices:
        """The samples of a shard of a step."""
        self._go_to(self.sampling.data_epoch(step))
        start, stop = self.sampling.shard_span(step, shard)
        return self._order[start:stop]

    def repeats(self, step: int, shard: int) -> Indices | None:
        """Of each of these samples, how often it came before in the data epoch; None: none did."""
        self._go_to(self.sampling.data_epoch(step))
        start, stop = self.sampling.shard_span(step, shard)
        return None if self._repeats is None else self._repeats[start:stop]

    def _go_to(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._order, self._epoch = self._draw(epoch), epoch
            self._repeats = None if self.rule is None else repeats_in(self._order)

    def _draw(self, epoch: int) -> Indices:
        if not self.sampling.shuffle:
            return np.arange(self.sampling.samples) - self._first
        drawn, before = [], -self._first
        for part, (samples, _) in enumerate(self.sampling.all_parts):
            which = (epoch, part) if self.sampling.parts else (epoch,)
            generator = torch.Generator().manual_seed(derive(self.sampling.seed, "order", *which))
            if self.rule is not None and part == self._part:
                share = max(1, self.sampling.batch_size * samples // self.sampling.samples)
                drawn.append(before + self.rule.draw(generator, share))
            else:
                drawn.append(before + torch.randperm(samples, generator=generator).numpy())
            before += samples
        return np.concatenate(drawn) if len(drawn) > 1 else drawn[0]
