"""Validation state: metrics and lists that held-out batches fill, gathered over all workers.

In one process, metrics of torchmetrics and lists (`self.outputs.append(...)`) fill up from batch to
batch. Here every batch begins with the module as it was built, and leaves a parcel. One worker
merges the parcels of all batches in the order of the data for on_validation_epoch_end, so that the
results are those of one process. The states of metrics are merged by their `dist_reduce_fx`, as
torchmetrics does between processes; sums are added one after the other.
"""

from __future__ import annotations

import base64
import collections
import functools
import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lockstep.errors import TaskError

Parcel = dict[str, Any]
"""`{"metrics": {name: {"count", "states"}}, "lists": {name: items}}`, as JSON can hold it."""


def is_metric(value: Any) -> bool:
    """Whether a value is a metric of torchmetrics, which is imported wherever there is one."""
    package = sys.modules.get("torchmetrics")
    return package is not None and isinstance(value, package.Metric)


def separate_metrics(module: nn.Module) -> None:
    """Have each metric of a collection keep states of its own.

    Otherwise torchmetrics merges metrics whose states are equal after the first batch, and which
    batch is the first depends on the worker.
    """
    package = sys.modules.get("torchmetrics")
    for part in module.modules():
        if package is not None and isinstance(part, package.MetricCollection):
            part._enable_compute_groups = part._groups_checked = False


class Kept:
    """Kept state: the metrics and lists of a module, reset before each batch."""

    def __init__(self, module: nn.Module) -> None:
        """Records the lists as the module was built with them. Called before the first batch."""
        self._metric_names = [n for n, part in module.named_modules() if is_metric(part)]
        self._lists = {name: list(v) for name, v in vars(module).items() if isinstance(v, list)}

    def _metrics(self, module: nn.Module) -> list[tuple[str, Any]]:
        return [(name, module.get_submodule(name)) for name in self._metric_names]

    def name_of(self, module: nn.Module, metric: Any) -> str:
        """The name of a metric that is logged.

        Raises:
            TaskError: it is not a metric of the module.
        """
        for name, own in self._metrics(module):
            if own is metric:
                return name
        raise TaskError(
            "a metric is logged that is not part of the module",
            expected="an attribute of the module, or in an nn.ModuleDict or nn.ModuleList there",
            found=type(metric).__name__,
            fix="make it in __init__, as an attribute: self.val_accuracy = ...",
        )

    def roll_back(self, module: nn.Module) -> None:
        """Reset metrics and lists to what they were when the module was built."""
        for _, metric in self._metrics(module):
            metric.reset()
        for name, built in self._lists.items():
            now = vars(module).get(name)
            if isinstance(now, list):
                now[:] = built
            else:
                setattr(module, name, list(built))

    def parcel(self, module: nn.Module) -> Parcel:
        """The parcel that a batch has left in the module."""
        metrics = {
            name: {"count": metric._update_count, "states": _encoded(name, metric.metric_state)}
            for name, metric in self._metrics(module)
            if metric._update_count
        }
        lists = {
            name: _encoded(name, items[len(self._lists.get(name, ())) :])
            for name, items in vars(module).items()
            if isinstance(items, list)
        }
        return {"metrics": metrics, "lists": {name: new for name, new in lists.items() if new}}

    def unpack(self, module: nn.Module, parcels: Sequence[Parcel]) -> None:
        """Load the parcels of all batches into the module, in their order."""
        self.roll_back(module)
        for name, metric in self._metrics(module):
            found = [each["metrics"][name] for each in parcels if name in each["metrics"]]
            if found:
                _fill(name, metric, [_decoded(each["states"]) for each in found])
                metric._update_count = sum(each["count"] for each in found)
        for name in dict.fromkeys(name for each in parcels for name in each["lists"]):
            items = [item for each in parcels for item in _decoded(each["lists"].get(name, []))]
            setattr(module, name, [*self._lists.get(name, ()), *items])

    def check_carried(self, module: nn.Module, parcels: Sequence[Parcel], hook: str) -> None:
        """Refuse a hook that keeps state between evaluations, such as the best value.

        Raises:
            TaskError: it changed a metric that no batch had changed.
        """
        filled = {name for each in parcels for name in each["metrics"]}
        carried = [
            n for n, metric in self._metrics(module) if metric._update_count and n not in filled
        ]
        if carried:
            raise TaskError(
                f"{hook} keeps something from one evaluation to the next",
                expected="numbers of this evaluation alone: a worker may die between two",
                found=", ".join(f"self.{name}" for name in carried),
                fix="leave that out, or the hook by skip=; the run keeps the metrics of every "
                "evaluation, so the best of them is in result.history",
            )


def held(module: nn.Module) -> dict[str, Any]:
    """A snapshot of the module's plain attributes, to find changes: numbers, None, the identity and
    version of tensors, and the sizes of dicts, sets and deques."""
    return {
        name: _mark(value)
        for name, value in vars(module).items()
        if (value is None or isinstance(value, HOLDING))
        and not name.startswith("_")
        and name != "training"
    }


HOLDING = (int, float, torch.Tensor, dict, set, collections.deque)
SMALL = 64
"""Items: of a larger dict only the size is compared."""


def _mark(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return f"tensor {id(value):x} after {value._version} changes"
    if isinstance(value, dict) and len(value) <= SMALL:
        return {key: _mark(item) for key, item in value.items()}
    if isinstance(value, dict | list | set | collections.deque):
        return f"{len(value)} items"
    return value if isinstance(value, int | float) else None


def check_held(module: nn.Module, before: dict[str, Any], method: str) -> None:
    """Refuse a method that keeps state in the module between batches.

    Raises:
        TaskError: a plain attribute has changed.
    """
    now = held(module)
    changed = {name: (value, now.get(name)) for name, value in before.items()}
    changed = {n: (old, new) for n, (old, new) in changed.items() if old is not new and old != new}
    if changed:
        raise TaskError(
            f"{method} keeps something in self.{next(iter(changed))}",
            expected="plain attributes that do not change: results would depend on the worker",
            found=", ".join(f"self.{n}: {old} -> {new}" for n, (old, new) in changed.items()),
            fix="use self.global_step, self.current_epoch or batch_idx; what training has to keep "
            "is a registered buffer; what validation gathers is a torchmetrics metric or a list, "
            "each an attribute of its own",
        )


def _fill(name: str, metric: Any, found: list[Mapping[str, Any]]) -> None:
    """Set a metric's states to those of all batches, merged."""
    for state, reduce in metric._reductions.items():
        values = [states[state] for states in found]
        setattr(metric, state, _together(f"{name}.{state}", reduce, values))
    metric._computed = None


def _together(name: str, reduce: Any, values: list[Any]) -> Any:
    """One state of a metric, merged over all batches by its `dist_reduce_fx`."""
    from torchmetrics.utilities import dim_zero_cat, dim_zero_mean, dim_zero_sum

    if isinstance(values[0], list):
        return [item for value in values for item in value]
    if reduce is dim_zero_sum:
        return functools.reduce(operator.add, values)
    if reduce is dim_zero_mean:
        raise TaskError(
            f"the state {name} of a metric is a mean over batches",
            expected="states that add up: dist_reduce_fx sum, cat, max or min",
            found="dist_reduce_fx mean, which would not be exact where a batch is short",
            fix="keep a sum and a count in the metric",
        )
    if reduce is dim_zero_cat:
        return dim_zero_cat(values)
    return torch.stack(values) if reduce is None else reduce(torch.stack(values))


def _encoded(name: str, value: Any) -> Any:
    """A value as JSON can hold it, without loss of bits.

    Raises:
        TaskError: it is of another type.
    """
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        data = base64.b64encode(flat.view(torch.uint8).numpy().tobytes()).decode("ascii")
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": data, "dtype": dtype, "shape": list(value.shape)}
    if isinstance(value, Mapping):
        return {"mapping": [[key, _encoded(name, item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(name, item) for item in value]}
    if isinstance(value, list):
        return [_encoded(name, item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TaskError(
        f"what validation_step leaves in self.{name} cannot be gathered",
        expected="tensors, numbers and texts, in lists, tuples and dicts",
        found=f"a {type(value).__name__}",
        fix="append tensors, or numbers by .tolist()",
    )


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(_decoded(item) for item in value["tuple"])
    if "mapping" in value:
        return {key: _decoded(item) for key, item in value["mapping"]}
    data, dtype = base64.b64decode(value["tensor"]), getattr(torch, value["dtype"])
    if not data:
        return torch.empty(value["shape"], dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(value["shape"])
