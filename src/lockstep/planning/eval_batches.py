"""Evaluation batches: a fixed grid over held-out data, and their results combined in order.

So metrics are exact for any number of workers. The batches carry what was gathered of every sample
to the coordinator, which puts it in the order of the data. Nothing here needs torch, which would
take the coordinator a second to import.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lockstep.errors import TaskError

BatchSums = dict[str, Any]
"""`{"batch": index, "samples": n, "sums": {metric: sum over the samples}, "outputs": Outputs}`,
ready for JSON."""
Outputs = dict[str, dict[str, Any]]
"""`{name: {"kind": "tensor" or "list", "values": one entry per sample}}`, ready for JSON."""


def batch_range(index: int, samples: int, batch_size: int) -> range:
    """The samples of a batch of the fixed grid."""
    return range(index * batch_size, min((index + 1) * batch_size, samples))


def combine(results: Sequence[BatchSums]) -> dict[str, float]:
    """The metrics over all samples: batch sums added in the order of the data.

    Raises:
        TaskError: batches do not agree on which metrics there are.
    """
    ordered = sorted(results, key=lambda item: item["batch"])
    if not ordered:
        return {}
    names = _agreed(ordered, "metrics", "sums")
    total = sum(item["samples"] for item in ordered)
    sums = dict.fromkeys(names, 0.0)
    for item in ordered:
        for name in names:
            sums[name] += item["sums"][name]
    return {name: value / total for name, value in sums.items()}


def gather(results: Sequence[BatchSums]) -> Outputs:
    """The outputs of all samples, in the order of the data.

    Raises:
        TaskError: batches do not agree on which outputs there are.
    """
    ordered = sorted(results, key=lambda item: item["batch"])
    gathered: Outputs = {}
    for name in _agreed(ordered, "outputs", "outputs") if ordered else []:
        parts = [item["outputs"][name] for item in ordered]
        values = [value for part in parts for value in part["values"]]
        gathered[name] = {"kind": parts[0]["kind"], "values": values}
    return gathered


def _agreed(ordered: Sequence[BatchSums], method: str, key: str) -> list[str]:
    """The names that every batch has, in the order of the first."""
    names = list(ordered[0][key])
    for item in ordered:
        if set(item[key]) != set(names):
            raise TaskError(
                f"Task.{method} gave other {method} for batch {item['batch']} than for batch 0",
                expected=", ".join(names),
                found=", ".join(item[key]),
                fix="return the same keys for every batch",
            )
    return names
