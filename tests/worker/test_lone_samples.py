"""A shard of one sample under BatchNorm: refused at the first step, with what avoids it."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from torch import nn

from lockstep.errors import TaskError
from lockstep.planning.sampling import Sampling
from lockstep.worker.lone_samples import LoneSamples

NET = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))


def of(samples: int, batch_size: int, shards: int, drop_last: bool = False) -> Sampling:
    return Sampling(
        samples=samples, batch_size=batch_size, shards=shards, seed=0, drop_last=drop_last
    )


def look(model: nn.Module, sampling: Sampling, *shape: int, steps: int = 1000) -> None:
    with LoneSamples(model, sampling, steps).watching(shape[0]):
        model(torch.randn(*shape))


@pytest.mark.parametrize(
    ("samples", "batch_size", "shards"), [(65, 16, 1), (67, 16, 2), (129, 64, 2), (64, 4, 4)]
)
def test_it_is_refused_and_the_remedies_help(samples: int, batch_size: int, shards: int) -> None:
    with pytest.raises(TaskError, match="a shard of one sample would reach BatchNorm1d 1") as error:
        look(NET, of(samples, batch_size, shards), 8, 4)
    fix = str(error.value.fix)
    (better,) = re.findall(r"set batch_size to (\d+)", fix)
    look(NET, of(samples, int(better), shards), 8, 4)
    if "drop_last" in fix:
        look(NET, of(samples, batch_size, shards, drop_last=True), 8, 4)
    for fewer in re.findall(r"set shards to (\d+)", fix):
        look(NET, of(samples, batch_size, int(fewer)), 8, 4)


def test_what_would_be_computed_is_not_refused() -> None:
    look(NET, of(64, 16, 2), 8, 4)
    look(NET, of(65, 16, 1), 8, 4, steps=3)  # the run ends before the short batch
    images = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    look(images, of(65, 16, 1), 8, 3, 5, 5)  # several values per channel and sample
    with pytest.raises(TaskError):
        look(images, of(65, 16, 1), 8, 3, 1, 1)
    frozen = nn.Sequential(nn.BatchNorm1d(4).eval(), nn.Linear(4, 1))
    look(frozen, of(65, 16, 1), 8, 4)


def test_it_looks_once() -> None:
    lone = LoneSamples(NET, of(65, 16, 1), 1000)
    with contextlib.suppress(TaskError), lone.watching(8):
        NET(torch.randn(8, 4))
    assert not NET[1]._forward_pre_hooks
    with lone.watching(8):
        NET(torch.randn(8, 4))
