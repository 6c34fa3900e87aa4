"""The rate of a run, from the commit times that the workers record."""

from __future__ import annotations


class Clock:
    """Counts samples and seconds between commits.

    The time between rests counts, from the first commit after each rest on; the first `warm_up`
    seconds do not.
    """

    def __init__(self, warm_up: float = 0.0) -> None:
        self.samples, self.seconds = 0, 0.0
        self._warm_up = warm_up
        self._begun: float | None = None
        self._last: float | None = None

    def committed(self, at: float, samples: int) -> float:
        """Count a step of so many samples, committed at this time; returns how long it took."""
        self._begun = at if self._begun is None else self._begun
        took = at - self._last if self._last is not None else 0.0
        if self._last is not None and at - self._begun >= self._warm_up:
            self.samples += samples
            self.seconds += took
        self._last = at
        return took

    def rest(self) -> None:
        """Leave the time until the next commit out."""
        self._last = None

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.samples / self.seconds if self.seconds else 0.0
