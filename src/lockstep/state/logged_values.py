"""Logged values: what `Task.loss` returned beside the loss, as means over a shard's samples."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch

from lockstep.errors import TaskError

RESERVED = ("loss", "norm", "step", "data_epoch", "samples")
"""Names that a step's record has already."""


def logged_means(values: Mapping[Any, Any], samples: int, *, absent: bool) -> dict[str, float]:
    """The mean of each value over a shard's samples, in float64.

    `absent`: whether fewer than `samples` may be there.

    Raises:
        TaskError: a name or a value cannot be logged.
    """
    means = {}
    for name, value in values.items():
        if not isinstance(name, str) or name in RESERVED:
            raise TaskError(
                f"Task.loss cannot log a value under the name {name!r}",
                expected=f"a text other than {', '.join(RESERVED)}, which a step has already",
                found=repr(type(name)),
                fix='return, for instance, (loss, {"accuracy": scores.argmax(1) == labels})',
            )
        means[name] = _mean(name, value, samples, absent=absent)
    return means


def _mean(name: str, value: Any, samples: int, *, absent: bool) -> float:
    if isinstance(value, Real):
        return float(value)
    try:
        tensor = torch.as_tensor(value).detach().double()
    except (TypeError, ValueError, RuntimeError):
        raise _unusable(name, samples, repr(value)[:200]) from None
    if tensor.numel() == 1:
        return tensor.item()
    count = len(tensor) if tensor.ndim == 1 else 0
    if count == samples or (absent and 0 < count < samples):
        return tensor.sum().item() / count
    raise _unusable(name, samples, f"shape {tuple(tensor.shape)}")


def _unusable(name: str, samples: int, found: str) -> TaskError:
    return TaskError(
        f"the value {name!r} that Task.loss returned beside the loss cannot be averaged",
        expected=f"one number, the mean over the shard, or one per sample: shape ({samples},)",
        found=found,
        fix="return each sample's value, or their mean",
    )
