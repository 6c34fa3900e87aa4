"""A digest of a data set, to tell whether two hosts have the same one: its length and samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from lockstep.data.fetching import Fetch

SAMPLES = 64
"""How many samples are digested, evenly over the set, the first and the last among them."""


def digest_of(fetch: Fetch, samples: int) -> str:
    """A digest of the data set that `fetch` reads, as the first data epoch has it."""
    digest = blake3(str(samples).encode())
    count = min(SAMPLES, samples)
    for number in range(count):
        index = number * (samples - 1) // max(count - 1, 1)
        _add(digest, fetch(0, [index]))
    return digest.hexdigest()[:32]


def text_digest(text: str) -> str:
    """A digest of a text."""
    return blake3(text.encode()).hexdigest()[:32]


def _add(digest: Any, value: Any) -> None:
    """What a batch holds; of objects of unknown types, that they are there."""
    if isinstance(value, torch.Tensor):
        value = value.to_dense() if value.layout is not torch.strided else value
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    elif isinstance(value, Mapping):
        for key in value:
            digest.update(str(key).encode())
            _add(digest, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _add(digest, item)
    elif value is None or isinstance(value, str | int | float | bool):
        digest.update(json.dumps(value).encode())
    else:
        digest.update(type(value).__qualname__.encode())
