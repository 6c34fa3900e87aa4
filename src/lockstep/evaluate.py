"""Held-out metrics, exact for any number of workers: a fixed grid of batches, summed in order."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from lockstep.buffers import Modes, PrivateBuffers
from lockstep.data import Fetch
from lockstep.errors import TaskError
from lockstep.job import Task
from lockstep.seeds import derive, seed_everything
from lockstep.state import SharedState

BatchSums = dict[str, Any]
"""`{"batch": index, "samples": n, "sums": {metric: sum over the samples}}`, ready for JSON."""


def batch_count(samples: int, batch_size: int) -> int:
    """How many held-out batches there are; the last may be short, none is padded."""
    return math.ceil(samples / batch_size)


def evaluate_batches(
    task: Task,
    shared: SharedState,
    fetch: Fetch,
    batches: Iterable[int],
    *,
    samples: int,
    batch_size: int,
    seed: int,
    autocast: bool,
    beat: Callable[[int], None],
) -> list[BatchSums]:
    """The sums of the given batches, with the committed parameters and buffers.

    `beat` is called with each batch's index before it is evaluated.
    """
    model = shared.model
    buffers = PrivateBuffers(model, shared.buffers)
    precision: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if autocast:
        precision = torch.autocast("cpu", torch.bfloat16)
    model.eval()
    modes = Modes(model)
    results = []
    try:
        with torch.no_grad(), precision:
            for index in batches:
                beat(index)
                start, stop = index * batch_size, min((index + 1) * batch_size, samples)
                batch = fetch(-1, range(start, stop))
                seed_everything(derive(seed, "eval", index))
                buffers.restore(shared.committed)  # metrics may change them: each batch its own
                modes.restore()
                values = task.metrics(model, batch)
                sums = _sums(values, stop - start)
                results.append({"batch": index, "samples": stop - start, "sums": sums})
    finally:
        model.train()
    return results


def _sums(values: object, samples: int) -> dict[str, float]:
    if not isinstance(values, Mapping):
        raise TaskError(
            "Task.metrics did not return a mapping",
            expected="names, and for each a number or a tensor",
            found=repr(type(values)),
            fix='return, for instance, {"loss": self.loss(model, batch)}',
        )
    return {str(name): _sum(name, value, samples) for name, value in values.items()}


def _sum(name: str, value: torch.Tensor | float, samples: int) -> float:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TaskError(
            f"the metric {name!r} is not a number",
            expected=f"one number, or one per sample: shape ({samples},)",
            found=repr(value)[:200],
            fix="return each sample's value, or their mean",
        ) from None
    if tensor.numel() == 1:
        return tensor.double().item() * samples
    if tensor.ndim == 1 and len(tensor) == samples:
        return tensor.double().sum().item()
    raise TaskError(
        f"the metric {name!r} has a shape that cannot be averaged over samples",
        expected=f"one number, or one per sample: shape ({samples},)",
        found=f"shape {tuple(tensor.shape)}",
        fix="return each sample's value, or their mean",
    )


def combine(results: Sequence[BatchSums]) -> dict[str, float]:
    """The metrics over all samples: batch sums added in the order of the data.

    Raises:
        TaskError: batches do not agree on which metrics there are.
    """
    ordered = sorted(results, key=lambda item: item["batch"])
    if not ordered:
        return {}
    names = list(ordered[0]["sums"])
    for item in ordered:
        if set(item["sums"]) != set(names):
            raise TaskError(
                f"Task.metrics gave other metrics for batch {item['batch']} than for batch 0",
                expected=", ".join(names),
                found=", ".join(item["sums"]),
                fix="return the same keys for every batch",
            )
    total = sum(item["samples"] for item in ordered)
    sums = dict.fromkeys(names, 0.0)
    for item in ordered:
        for name in names:
            sums[name] += item["sums"][name]
    return {name: value / total for name, value in sums.items()}
