"""Spin budget: how often a process looks at a word before it sleeps, by how long it has waited.

Who waits for a worker that computes does best to look: it is there at once. Who waits for one that
has no core, since other processes have them, keeps the core from it by looking.
"""

from __future__ import annotations

SHORT_SECONDS = 1e-3
"""A wait of this length is a short one: what workers usually differ by."""


class SpinBudget:
    """Spin budget of one end of a meeting."""

    def __init__(self, most: int) -> None:
        self.spins, self._most = most, most

    def learn(self, seconds: float) -> None:
        """A wait has taken so long: one look after a long one, twice as many after a short one."""
        self.spins = min(2 * self.spins, self._most) if seconds < SHORT_SECONDS else 1
