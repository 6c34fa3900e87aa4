"""From steps and shards to the indices of samples, and from these to batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from lockstep.data.order_rules import Indices
from lockstep.errors import DataError
from lockstep.job.task import Task
from lockstep.planning.sampling import describe_samples
from lockstep.system.own_generators import OwnGenerators
from lockstep.system.seeding import derive


class Fetch(Protocol):
    """Fetches a batch of the samples with these indices."""

    def __call__(
        self, data_epoch: int, indices: Sequence[int] | Indices, repeats: Indices | None = None
    ) -> Any:
        """`repeats`: how often each came before in the data epoch, where samples are drawn with
        replacement; None: it did not."""


@dataclass
class AbsentSamples:
    """The samples of a batch that are None, which the task's `collate` is to leave out.

    A mean over what is left has fewer samples than the batch was to have. Where a batch is divided
    into shards, each would need to know of all others', so they are refused there.
    """

    allowed: bool
    count: int = 0
    """How many of the batch that was fetched last."""

    def look(self, samples: Sequence[Any], indices: Sequence[int]) -> None:
        """Count them.

        Raises:
            DataError: there are some, and none is allowed.
        """
        absent = [i for i, sample in zip(indices, samples, strict=True) if _is_absent(sample)]
        self.count = len(absent)
        if absent and not self.allowed:
            raise DataError(
                "samples are None: what collate leaves out would count in the weights of shards",
                expected="a sample for every index",
                found=f"None, of the data set's samples {describe_samples(absent)}",
                fix="leave them out of the data set, for instance by torch.utils.data.Subset(data, "
                "good); or set shards to 1, which does not divide the batch",
            )


def _is_absent(sample: Any) -> bool:
    several = isinstance(sample, tuple | list) and len(sample) > 0
    return all(part is None for part in sample) if several else sample is None


def make_fetch(
    task: Task, dataset: Dataset[Any], seed: int, absent: AbsentSamples | None = None
) -> Fetch:
    """How batches of this data set are made. `absent` looks at their samples.

    A `TensorDataset` is indexed whole, unless the task collates itself; anything else is asked for
    its samples, each under its own seed, so that augmentation does not depend on who loads what.
    Generators that data set and task own are seeded like the global ones.

    Raises:
        TaskError: one of these cannot be seeded.
    """
    plain = getattr(task.collate, "__func__", None) is Task.collate
    if type(dataset) is TensorDataset and plain:
        return TensorRows(dataset.tensors)
    generators = OwnGenerators({"data": dataset, "task": task})
    get_all = getattr(dataset, "__getitems__", None)
    if get_all is not None:

        def fetch_all(
            data_epoch: int, indices: Sequence[int] | Indices, repeats: Indices | None = None
        ) -> Any:
            generators.seed_all(derive(seed, "sample", *_draws(data_epoch, indices, repeats)[0]))
            wanted = _as_list(indices)
            samples = get_all(wanted)
            if absent is not None:
                absent.look(samples, wanted)
            return task.collate(samples)

        return fetch_all

    def fetch_each(
        data_epoch: int, indices: Sequence[int] | Indices, repeats: Indices | None = None
    ) -> Any:
        samples = []
        for draw in _draws(data_epoch, indices, repeats):
            generators.seed_all(derive(seed, "sample", *draw))
            index = draw[1]
            try:
                samples.append(dataset[index])
            except BaseException as error:  # the user's code may call sys.exit()
                error.add_note(f"It was raised for sample {index} of the data set.")
                raise
        if absent is not None:
            absent.look(samples, _as_list(indices))
        return task.collate(samples)

    return fetch_each


def _draws(
    data_epoch: int, indices: Sequence[int] | Indices, repeats: Indices | None
) -> list[tuple[int, ...]]:
    """What decides the seed of each sample: another one where it is drawn again."""
    if repeats is None:
        return [(data_epoch, index) for index in _as_list(indices)]
    return [
        (data_epoch, index, again) if again else (data_epoch, index)
        for index, again in zip(_as_list(indices), repeats.tolist(), strict=True)
    ]


class TensorRows:
    """Fetches batches of a `TensorDataset`: rows of each tensor."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        sizes = [tensor[:1].numel() * tensor.dtype.itemsize for tensor in tensors]
        self._row_bytes = max(sum(sizes), 1)
        self._unit = max((ALIGN // math.gcd(size, ALIGN) for size in sizes if size), default=1)

    def __call__(
        self, data_epoch: int, indices: Sequence[int] | Indices, repeats: Indices | None = None
    ) -> list[torch.Tensor]:
        rows = _as_index(indices)
        return [tensor.index_select(0, rows) for tensor in self._tensors]

    def ahead(self, samples: int) -> int:
        """How many batches of so many samples are worth fetching at once: small ones, whose
        copying costs less than the calls to have it done."""
        return max(1, min(MOST_AHEAD, AHEAD_BYTES // (samples * self._row_bytes + 1)))

    def several(self, batches: Sequence[Indices]) -> list[list[torch.Tensor]]:
        """Batches as slices of one gathered tensor, each beginning where memory is aligned, since
        some kernels round differently where it is not."""
        starts, pieces, size = [], [], 0
        for indices in batches:
            starts.append(size)
            padding = -len(indices) % self._unit
            pieces += [indices, indices[:1].repeat(padding)]
            size += len(indices) + padding
        gathered = self(0, np.concatenate(pieces))
        return [
            [tensor[start : start + len(indices)] for tensor in gathered]
            for start, indices in zip(starts, batches, strict=True)
        ]


ALIGN = 64
"""Bytes."""
MOST_AHEAD, AHEAD_BYTES = 8, 1 << 21


def _as_index(indices: Sequence[int] | Indices) -> torch.Tensor:
    if isinstance(indices, np.ndarray):
        return torch.from_numpy(indices)
    return torch.as_tensor(indices)


def _as_list(indices: Sequence[int] | Indices) -> list[int]:
    return indices.tolist() if isinstance(indices, np.ndarray) else list(indices)
