"""Optimizer state: its keys, and its values in shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

NUMBER_TYPES: dict[str, type] = {"int": int, "float": float, "bool": bool}


@dataclass(frozen=True, kw_only=True)
class StateKey:
    """One value that an optimizer keeps per tensor."""

    name: str
    form: str
    """`like` (a tensor of as many elements as the block), `tensor`, or a Python number's type."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    """Of a tensor that is not row-major."""
    rebound: bool
    """Whether the optimizer may replace the object, rather than change it in place."""


def store_value(stored: torch.Tensor, value: Any) -> None:
    """Write one value of optimizer state, a tensor or a number, to shared memory."""
    if isinstance(value, torch.Tensor):
        if value.data_ptr() != stored.data_ptr():
            stored.copy_(value.reshape(stored.shape))
    else:
        stored.fill_(value)


def load_value(stored: torch.Tensor, key: StateKey) -> Any:
    """What the optimizer shall see in its state: the shared tensor, or a Python number."""
    if key.form in NUMBER_TYPES:
        return NUMBER_TYPES[key.form](stored.item())
    return stored
