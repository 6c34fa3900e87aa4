"""Fetching: batches read one by one or together, and when loader processes pay."""

from __future__ import annotations

import numpy as np
import torch

from lockstep.data.fetching import TensorRows
from lockstep.data.loader import FetchTimes, wants_loaders


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
