"""Random numbers as pure functions of what they are for, never of who draws them.

Every seed is `derive(seed, purpose, *numbers)`: the first 8 bytes of a BLAKE2b digest. So a plain
loop can repeat any draw of a run; the purposes are

    order   (data_epoch)          the permutation of the training set
    shard   (step, shard)         dropout and whatever else the loss draws
    sample  (data_epoch, index)   data augmentation of one sample
    eval    (batch)               whatever a metric draws

A generator that the user's objects own gets `derive(that seed, its path)` (see `own_generators`).
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed for `purpose`, from the job's seed and the numbers that identify the draw."""
    text = "/".join([str(seed), purpose, *map(str, numbers)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(value: int) -> None:
    """Seed the CPU generators of torch, Python and NumPy: what `torch.manual_seed` and its two
    siblings do, without the 90 microseconds that torch's takes to look for accelerators."""
    torch.default_generator.manual_seed(value)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)


def generator_states() -> tuple[object, ...]:
    """The states of these generators, to be compared: have random numbers been drawn meanwhile?"""
    kind, keys, *rest = np.random.get_state()
    torch_state = bytes(torch.get_rng_state().numpy())
    return torch_state, random.getstate(), kind, np.asarray(keys).tobytes(), tuple(rest)
