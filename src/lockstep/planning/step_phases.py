"""Step phases: the phases of a step as one word that only grows: the barrier's protocol."""

from __future__ import annotations

import enum

PHASES_PER_STEP = 8


MAX_STEPS = 2**31 // PHASES_PER_STEP - 2


class Phase(enum.IntEnum):
    """What a worker has reached within a step; its progress word is `step * 8 + phase`."""

    STARTED = 0
    COMPUTED = 1
    GUARDED = 2
    AUDITED = 3
    SUMMED = 4
    REDUCED = 5
    NORMED = 6
    UPDATED = 7


class Stage(enum.IntEnum):
    """What the exchanger has reached within a step; its word is `step * 8 + stage`."""

    STARTED = 0
    SENDING = 1
    """This host's gradients are whole, and on their way: nobody may sum them once more."""
    GATHERED = 2
    """What other hosts have computed is there."""
    NORMED = 3
    RETURNING = 4
    """What this host has made of its share is whole, and on its way. When what the others have made
    of theirs is there, the next step is started."""


def progress_of(step: int, phase: Phase) -> int:
    """The progress word for `phase` of `step`."""
    return step * PHASES_PER_STEP + phase


def exchange_of(step: int, stage: Stage) -> int:
    """The exchanger's word for `stage` of `step`."""
    return step * PHASES_PER_STEP + stage


def describe_progress(word: int) -> tuple[int, str]:
    """The step and the phase that a worker with this progress word is in: what comes next."""
    step, phase = divmod(word, PHASES_PER_STEP)
    doing = ("compute", "reduce", "audit", "reduce", "exchange", "norm", "update", "commit")
    return step, doing[phase]
