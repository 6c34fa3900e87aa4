"""From steps and shards to the indices of samples, and from these to batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from lockstep.data.sample_order import Indices
from lockstep.job.task import Task
from lockstep.system.own_generators import OwnGenerators
from lockstep.system.seeding import derive

Fetch = Callable[[int, Sequence[int] | Indices], Any]
"""`(data_epoch, indices) -> batch`."""


def make_fetch(task: Task, dataset: Dataset[Any], seed: int) -> Fetch:
    """How batches of this data set are made.

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

        def fetch_all(data_epoch: int, indices: Sequence[int] | Indices) -> Any:
            generators.seed_all(derive(seed, "sample", data_epoch, int(indices[0])))
            return task.collate(get_all(_as_list(indices)))

        return fetch_all

    def fetch_each(data_epoch: int, indices: Sequence[int] | Indices) -> Any:
        samples = []
        for index in _as_list(indices):
            generators.seed_all(derive(seed, "sample", data_epoch, index))
            try:
                samples.append(dataset[index])
            except BaseException as error:  # the user's code may call sys.exit()
                error.add_note(f"It was raised for sample {index} of the data set.")
                raise
        return task.collate(samples)

    return fetch_each


class TensorRows:
    """Fetches batches of a `TensorDataset`: rows of each tensor."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors
        sizes = [tensor[:1].numel() * tensor.dtype.itemsize for tensor in tensors]
        self._row_bytes = max(sum(sizes), 1)
        self._unit = max((ALIGN // math.gcd(size, ALIGN) for size in sizes if size), default=1)

    def __call__(self, _: int, indices: Sequence[int] | Indices) -> list[torch.Tensor]:
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
