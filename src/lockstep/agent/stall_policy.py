"""Stall policy: how long a worker may show no sign of life."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def stalled(
    words: Sequence[int], silent_for: Sequence[float], limits: Sequence[float]
) -> tuple[list[int], str]:
    """Which members have stopped making progress, by index, and why one thinks so.

    Those that are furthest behind hold everybody up; the others wait for them. `silent_for` is how
    many seconds each has shown no sign of life, `limits` how many it may.
    """
    lowest = min(words)
    behind = [
        index
        for index, word in enumerate(words)
        if word == lowest and silent_for[index] > limits[index]
    ]
    if not behind:
        return [], "everybody moves"
    return behind, f"no progress for {max(limits[index] for index in behind):.1f} s"


@dataclass
class StallTimeout:
    """How long a worker may show no sign of life: longer than anything has taken, by a margin.

    Who is stopped (SIGSTOP) is known to get nowhere. Who runs or sleeps may just be slow: it is
    waited for longer, and longer still after each that was given up on in vain.
    """

    setting: float | None
    longest: float = 0.0
    """Seconds: the longest step."""
    silence: float = 0.0
    """Seconds: the longest silence that ended by itself."""
    steps: int = 0
    given_up: int = 0
    """Workers that were given up on since the last committed step."""

    FIRST = 300.0
    """Seconds, for what is done for the first time: kernels are prepared, caches are cold."""
    STOPPED, LEAST, HURRIED = 1.0, 30.0, 5.0
    MARGIN, MARGIN_OF_SILENCE = 10.0, 3.0

    def step_took(self, seconds: float) -> None:
        """Learn from a committed step."""
        self.longest = max(self.longest, seconds)
        self.steps += 1
        self.given_up = 0

    def silence_ended(self, seconds: float) -> None:
        """Learn from a worker that was silent for so long and went on."""
        self.silence = max(self.silence, seconds)

    def exchange_limit(self, *, first: bool = False) -> float:
        """Seconds that a host may take for its part of an exchange: as long as it takes to replace
        a worker that has stalled there, and more. `first`: some host has just joined."""
        setting = self.setting or 0.0
        if first or self.steps < 3:
            return 2.0 * max(self.FIRST, setting)
        return 2.0 * max(self.LEAST, setting, self.MARGIN * self.longest)

    def hurried(self) -> float:
        """The same when the run is to stop."""
        return max(self.HURRIED if self.steps >= 3 else self.LEAST, 3.0 * self.longest)

    def limit(self, *, stopped: bool = False, first: bool = False) -> float:
        """Seconds; `first`: nothing of the kind has been done before."""
        if self.setting is not None:
            return self.setting
        if stopped:
            return self.STOPPED
        if first or self.steps < 3:
            return self.FIRST
        known = (self.MARGIN * self.longest, self.MARGIN_OF_SILENCE * self.silence)
        return max(self.LEAST, *known) * 2.0**self.given_up
