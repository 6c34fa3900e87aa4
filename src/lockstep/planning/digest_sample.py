"""Digest sample: which bytes of the state the ledger digests at each step."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass

from lockstep.planning.byte_ranges import ALIGN
from lockstep.planning.memory_layout import APART, Layout


@dataclass(frozen=True, kw_only=True)
class DigestUnit:
    """A run of bytes of the state segment that is digested as one."""

    name: str
    offset: int
    nbytes: int
    param: int | None
    """The trainable parameter that it is of, or of whose optimizer state."""


PARTS = 256
"""A state is cut into about so many digest units, as long as they are of a sensible size."""


UNIT_BYTES = (4 << 10, 128 << 10)
"""Bytes: the least and the largest size of a digest unit."""


@dataclass(frozen=True, kw_only=True)
class DigestSample:
    """Which units the ledger records after each step: a rolling sample of the state.

    A step records one unit of the trainable parameters and one of everything else, in turn,
    so that a change of any parameter shows at once or at the next step's losses, and every byte
    is looked at again and again at a cost that does not grow with the model.
    """

    params: tuple[DigestUnit, ...]
    others: tuple[DigestUnit, ...]
    every: int
    """Only every so many steps: a small model's steps are too short for a digest each."""

    def units(self, step: int) -> tuple[DigestUnit, ...]:
        """The units that the ledger records for `step`."""
        turn, left = divmod(step, self.every)
        if left:
            return ()
        return tuple(group[turn % len(group)] for group in (self.params, self.others) if group)

    def split(
        self, step: int, params: Container[int]
    ) -> tuple[dict[int, DigestUnit], dict[int, DigestUnit]]:
        """The units of `step`, by their index in it: those of these parameters, and all others.

        Whoever alone updates some parameters, alone has their optimizer state: it digests the
        units of theirs, and every host digests those that nobody has alone.
        """
        apart: dict[int, DigestUnit] = {}
        others: dict[int, DigestUnit] = {}
        for index, unit in enumerate(self.units(step)):
            own = unit.param is not None and unit.param in params
            (apart if own else others)[index] = unit
        return apart, others


SMALL_STATE, SMALL_EVERY = 1 << 20, 8


PER_STEP = 2
"""The largest number of units that a step records."""


def plan_digest_sample(layout: Layout) -> DigestSample:
    """Cut the state into digest units."""
    total = sum(entry.nbytes for entry in layout.entries)
    least, most = UNIT_BYTES
    length = min(max(math.ceil(total / PARTS / ALIGN) * ALIGN, least), most)
    params: list[DigestUnit] = []
    others: list[DigestUnit] = []
    for entry in layout.entries:
        if entry.kind in APART:
            continue  # losses would show that it has changed
        param = layout.param_of.get(entry.name)
        group = params if entry.kind == "param" and param is not None else others
        parts = max(1, math.ceil(entry.nbytes / length))
        for part in range(parts):
            start, stop = part * length, min((part + 1) * length, entry.nbytes)
            label = entry.name if parts == 1 else f"{entry.name}[{part}/{parts}]"
            offset = entry.offset + start
            nbytes = stop - start
            group.append(DigestUnit(name=label, offset=offset, nbytes=nbytes, param=param))
    every = 1 if total >= SMALL_STATE else SMALL_EVERY
    return DigestSample(params=tuple(params), others=tuple(others), every=every)
