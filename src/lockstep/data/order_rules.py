"""Order rules: what a task may say of its samples that decides their order, weights or lengths.

Each is a pure function of a generator, which has the data epoch's seed: the same on any number of
workers, when a step is replayed, and in a resumed run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

from lockstep.errors import DataError
from lockstep.job.task import Task
from lockstep.planning.sampling import describe_samples

Indices = npt.NDArray[np.int64]
MOST_BATCHES = 50
"""Of which a megabatch consists, as in transformers' `LengthGroupedSampler`; in a small set of
fewer, so that there are four megabatches."""


@dataclass(frozen=True, eq=False)
class ByWeight:
    """Weighted sampling: as many draws as there are samples, with replacement, each in proportion
    to the samples' weights. The draws of torch's `WeightedRandomSampler`."""

    weights: npt.NDArray[np.float64]

    @property
    def description(self) -> str:
        """What decides, with a digest of it: in the plan, and so in the manifest."""
        return f"weighted {_digest(self.weights)}"

    def draw(self, generator: torch.Generator, batch_size: int) -> Indices:
        """The order of a data epoch."""
        bounds = np.cumsum(self.weights)
        bounds /= bounds[-1]
        drawn = torch.rand(len(bounds), dtype=torch.float64, generator=generator).numpy()
        # `right`: a draw that meets a bound takes the next sample, never one of weight 0.
        return np.searchsorted(bounds, drawn, side="right").astype(np.int64)


@dataclass(frozen=True, eq=False)
class ByLength:
    """Length-grouped sampling: a permutation in which samples of about the same length come
    together. That of transformers' `LengthGroupedSampler`.

    A random permutation is cut into megabatches, each is sorted by length, the longest first, and
    the longest sample of all comes first: what does not fit into memory fails at once.
    """

    lengths: npt.NDArray[np.float64]

    @property
    def description(self) -> str:
        """As `ByWeight.description`."""
        return f"grouped by length {_digest(self.lengths)}"

    def draw(self, generator: torch.Generator, batch_size: int) -> Indices:
        """The order of a data epoch."""
        samples = len(self.lengths)
        size = batch_size * max(1, min(samples // (batch_size * 4), MOST_BATCHES))
        order: Indices = torch.randperm(samples, generator=generator).numpy()
        for start in range(0, samples, size):
            mega = order[start : start + size]
            order[start : start + size] = mega[np.argsort(-self.lengths[mega], kind="stable")]
        longest = size * int(np.argmax(self.lengths[order[::size]]))
        order[[0, longest]] = order[[longest, 0]]
        return order


OrderRule = ByWeight | ByLength


def rule_of(task: Task, dataset: Any, samples: int, *, shuffle: bool) -> OrderRule | None:
    """What the task says of the samples of its training set; None: nothing.

    Raises:
        DataError: it cannot be meant.
    """
    weights, lengths = task.sample_weights(dataset), task.sample_lengths(dataset)
    if weights is None and lengths is None:
        return None
    given = "sample_lengths" if weights is None else "sample_weights"
    if weights is not None and lengths is not None:
        _refuse("has both weights and lengths", "one of the two", "both", given)
    if not shuffle:
        _refuse("decides the order, and shuffle is off", "shuffle = true", "shuffle = false", given)
    numbers = _numbers(lengths if weights is None else weights, given)
    if numbers.shape != (samples,):
        found = f"{list(numbers.shape)}, for {samples} samples"
        _refuse("does not say one number per sample", f"the shape [{samples}]", found, given)
    wrong = np.flatnonzero(~(np.isfinite(numbers) & (numbers >= 0)))
    if len(wrong):
        found = f"{numbers[wrong[0]]} for sample {describe_samples(wrong.tolist())}"
        _refuse("has numbers that are none", "0 or more, and finite", found, given)
    if weights is None:
        return ByLength(numbers)
    with np.errstate(over="ignore"):
        total = numbers.sum()
    if not 0 < total < np.inf:
        _refuse("has weights of no sum", "a sum above 0, and finite", str(total), given)
    return ByWeight(numbers)


def _numbers(values: Any, given: str) -> npt.NDArray[np.float64]:
    if isinstance(values, torch.Tensor):
        values = values.detach().to(torch.float64).numpy()
    try:
        return np.array(values, np.float64)
    except (TypeError, ValueError) as error:
        _refuse("does not return numbers", "one number per sample", str(error), given)
        raise  # never reached


def _refuse(what: str, expected: str, found: str, given: str) -> None:
    raise DataError(
        f"Task.{given}() {what}",
        expected=expected,
        found=found,
        fix="return one number per sample of the data set that it is given, or None"
        if "shuffle" not in what
        else f"leave shuffle as it is, or have {given} return None",
    )


def _digest(numbers: npt.NDArray[np.float64]) -> str:
    return blake3(numbers.tobytes()).hexdigest()[:32]


def repeats_in(order: Indices) -> Indices | None:
    """Of each place in an order, how often its sample came before; None: each comes once."""
    by_sample = np.argsort(order, kind="stable")
    found = order[by_sample]
    first = np.r_[True, found[1:] != found[:-1]]
    if first.all():
        return None
    places = np.arange(len(order))
    repeats = np.empty_like(places)
    repeats[by_sample] = places - np.maximum.accumulate(np.where(first, places, 0))
    return repeats
