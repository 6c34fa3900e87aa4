"""Checkpoint timer: when a checkpoint is due by time, so that nothing much is lost by default.

Where a job does not say when, there is one at least once a minute and at the ends of data epochs,
but only as often as their cost stays under a hundredth of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS = 60.0
"""Between two checkpoints, where a job does not say."""
COST_SHARE = 0.01
"""The part of the time that such checkpoints may cost."""
LEAST_COST = 0.05
"""Seconds that one is taken to cost at least: workers come to rest, and go on."""
BYTES_PER_SECOND = 5e8
"""What is assumed of copying, digesting and writing a state, until it has been measured."""


class CheckpointTimer:
    """Says when the next checkpoint is due."""

    def __init__(
        self,
        every: float | None,
        *,
        automatic: bool,
        state_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin now.

        Args:
            every: seconds between two checkpoints, as a job asks for them; None: it does not.
            automatic: whether they are due without being asked for.
            state_bytes: the size of the state, for a first guess at the cost.
            clock: seconds since some moment.
        """
        self._every, self._automatic, self._clock = every, automatic, clock
        guess = state_bytes / BYTES_PER_SECOND
        self.taken(0.0, lambda: guess)

    def taken(self, stalled: float, writing: Callable[[], float]) -> None:
        """A checkpoint has just been handed over to be written.

        Args:
            stalled: for how many seconds the workers have rested for it.
            writing: asked later for the seconds of a core that writing it has taken.
        """
        self._last, self._stalled, self._writing = self._clock(), stalled, writing

    @property
    def _cost(self) -> float:
        """Seconds that a checkpoint costs the run: what its writer computes, workers do not."""
        return max(LEAST_COST, self._stalled + self._writing())

    @property
    def affordable(self) -> bool:
        """Whether one that nobody has asked for may be written, as at a data epoch's end."""
        return self._automatic and self._passed >= self._cost / COST_SHARE

    @property
    def due(self) -> bool:
        """Whether one has to be written, wherever in a data epoch the run is."""
        if self._automatic:
            return self._passed >= SECONDS and self.affordable
        return self._every is not None and self._passed >= self._every

    @property
    def _passed(self) -> float:
        return self._clock() - self._last
