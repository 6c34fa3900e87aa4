"""Placement: a batch's tensors on a device, in the containers in which they came."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch


def place(batch: Any, device: torch.device) -> Any:
    """The batch with all of its tensors there; everything else is as it was.

    Tensors in lists, tuples (named ones, too), mappings and what has a `to`, as the batches of
    transformers, are found; those in other objects are not.
    """
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        placed = {key: place(value, device) for key, value in batch.items()}
        return placed if type(batch) is dict else _mapping(batch, placed)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(place(each, device) for each in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(place(each, device) for each in batch)
    return batch


def _mapping(batch: Mapping[Any, Any], placed: dict[Any, Any]) -> Any:
    """A mapping of the same class."""
    other: Any = copy.copy(batch)
    for key, value in placed.items():
        other[key] = value
    return other
