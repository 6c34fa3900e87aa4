"""Presence: which shards of a step have a gradient for which parameter."""

from __future__ import annotations

from collections.abc import Container, Sequence
from functools import lru_cache

import numpy as np

from lockstep.state.control_segment import ControlSegment

Mask = tuple[bool, ...]
"""By shard: whether there is a gradient."""


class GradientPresence:
    """For each trainable parameter, which of the step's shards have a gradient for it.

    With `subtrees`, which together cover all shards, it is asked of whole subtrees: of each, the
    first shard stands for all.
    """

    def __init__(
        self, control: ControlSegment, active: Sequence[int], subtrees: tuple[range, ...] = ()
    ) -> None:
        flags = control.has_grad
        shards = len(flags)
        self.uniform: Mask | None = None
        """The mask that all parameters share, or None where they differ."""
        everything = flags if len(active) == shards else flags[list(active)]
        if everything.tobytes() == _all_there(everything.size):
            self.uniform = _mask(tuple(active), shards, subtrees)
            return
        there = (flags != 0) & np.array(_mask(tuple(active), shards, ()))[:, None]
        if subtrees:
            starts = [tree.start for tree in subtrees]
            summed = np.zeros_like(there)
            summed[starts] = np.logical_or.reduceat(there, starts, axis=0)
            there = summed
        self._masks = [tuple(column) for column in there.T.tolist()]

    def of(self, param: int) -> Mask:
        return self._masks[param] if self.uniform is None else self.uniform


class Summed(GradientPresence):
    """Presence where everything is summed already, but the gradients of large tables."""

    def __init__(self, presence: GradientPresence, tables: Container[int]) -> None:
        self._presence, self._tables = presence, tables
        self.uniform = None if presence.uniform is None else (True,)

    def of(self, param: int) -> Mask:
        mask = self._presence.of(param)
        return mask if param in self._tables else (any(mask),)


@lru_cache(maxsize=64)
def _all_there(count: int) -> bytes:
    return b"\x01" * count


@lru_cache(maxsize=64)
def _mask(active: tuple[int, ...], shards: int, subtrees: tuple[range, ...]) -> Mask:
    if not subtrees:
        return tuple(shard in active for shard in range(shards))
    first = {tree.start for tree in subtrees if any(shard in active for shard in tree)}
    return tuple(shard in first for shard in range(shards))
