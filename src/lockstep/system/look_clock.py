"""Look clock: the time between two looks at others, as far as it counts as their silence."""

from __future__ import annotations

import time

LONGEST_LOOK = 0.5
"""Seconds: no more than this counts between two looks. Who was stopped itself, with the whole job
or by a slow disk, cannot tell that others were silent."""


class LookClock:
    """Says how much time has passed since it was last asked."""

    def __init__(self) -> None:
        self._looked = time.monotonic()

    def passed(self) -> float:
        """Seconds since the last look, at most `LONGEST_LOOK`."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, LONGEST_LOOK), now
        return passed
