"""Presence: which shards of a step have a gradient for which parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np

from lockstep.state.control_segment import ControlSegment

Mask = tuple[bool, ...]
"""By shard: whether there is a gradient."""
EMPTY: Mapping[int, Mask] = {}


class GradientPresence:
    """For each trainable parameter, which of the step's shards have a gradient for it."""

    __slots__ = ("_masks", "uniform")

    def __init__(self, uniform: Mask | None, masks: Mapping[int, Mask] = EMPTY) -> None:
        """`uniform`: the mask of all parameters that are not in `masks`; None: they all are."""
        self.uniform = uniform
        self._masks = masks

    @staticmethod
    def of_step(
        control: ControlSegment, active: Sequence[int], subtrees: tuple[range, ...] = ()
    ) -> GradientPresence:
        """What the control segment says of a step with these active shards.

        With `subtrees`, which together cover all shards, it is asked of whole subtrees: of each,
        the first shard stands for all.
        """
        flags = control.has_grad
        shards = len(flags)
        everything = flags if len(active) == shards else flags[list(active)]
        if everything.tobytes() == _all_there(everything.size):
            return GradientPresence(_mask(tuple(active), shards, subtrees))
        there = (flags != 0) & np.array(_mask(tuple(active), shards, ()))[:, None]
        if subtrees:
            starts = [tree.start for tree in subtrees]
            summed = np.zeros_like(there)
            summed[starts] = np.logical_or.reduceat(there, starts, axis=0)
            there = summed
        return GradientPresence(None, dict(enumerate(map(tuple, there.T.tolist()))))

    def of(self, param: int) -> Mask:
        """By shard: whether there is a gradient of this parameter."""
        if self.uniform is None or param in self._masks:
            return self._masks[param]
        return self.uniform

    def summed(self, tables: Iterable[int]) -> GradientPresence:
        """The same where there is one sum of everything but these parameters, large tables."""
        apart = {param: self.of(param) for param in tables}
        if self.uniform is not None:
            return GradientPresence((True,), apart)
        sums = {param: (any(mask),) for param, mask in self._masks.items()}
        return GradientPresence(None, {**sums, **apart})


@lru_cache(maxsize=64)
def _all_there(count: int) -> bytes:
    return b"\x01" * count


@lru_cache(maxsize=64)
def _mask(active: tuple[int, ...], shards: int, subtrees: tuple[range, ...]) -> Mask:
    if not subtrees:
        return tuple(shard in active for shard in range(shards))
    first = {tree.start for tree in subtrees if any(shard in active for shard in tree)}
    return tuple(shard in first for shard in range(shards))
