"""Predictions: what predict_step returns, as rows of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lockstep.errors import TaskError

COLUMN = "prediction"
"""The name of the only column, where predict_step returns no names."""


def rows_of(found: Any, samples: int) -> list[dict[str, Any]]:
    """A row for each sample, from a tensor `[n, ...]` or a list, or a mapping of these.

    Raises:
        TaskError: there is not one entry for each sample.
    """
    columns = found if isinstance(found, Mapping) else {COLUMN: found}
    plain = {name: _entries(value) for name, value in columns.items()}
    if not plain or any(entries is None or len(entries) != samples for entries in plain.values()):
        raise TaskError(
            "predict_step did not return one prediction for each sample",
            expected=f"a tensor whose first size is {samples}, or a dict of such tensors",
            found="; ".join(f"{name}: {_form(value)}" for name, value in columns.items()),
            fix='return, for instance, {"label": scores.argmax(1), "score": scores.max(1).values}',
        )
    return [dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)]


def _entries(value: Any) -> Sequence[Any] | None:
    if isinstance(value, torch.Tensor):
        return value.tolist() if value.ndim else None
    return value if isinstance(value, list) else None


def _form(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
    return f"a {type(value).__name__}{shape}"
