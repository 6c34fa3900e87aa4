"""Barriers alone: two processes that meet twice a step like workers, and exchange nothing."""

from __future__ import annotations

import ctypes
import time
from typing import Any

from lockstep.collectives.barrier import NAP, SPINS
from lockstep.system import futex

WORDS = 48
"""Of 4 bytes; each process's lies in a cache line of its own, and so does the number of steps."""
APART = 16
WAIT = 60.0


class Meeting:
    """One process's side of the barrier. `words` is shared, zeros at first."""

    def __init__(self, words: Any, rank: int) -> None:
        self._words, self._mine, self._theirs = words, APART * rank, APART * (1 - rank)
        self._address = ctypes.addressof(words)
        self._met = 0

    def meet(self) -> None:
        """Return when the other has come as often.

        Raises:
            TimeoutError: it has not come for a minute.
        """
        words, theirs = self._words, self._theirs
        self._met += 1
        words[self._mine] = self._met
        futex.wake(self._address + 4 * self._mine)
        spins, until = SPINS, 0.0
        while (seen := words[theirs]) < self._met:
            if spins:
                spins -= 1
                continue
            until = until or time.monotonic() + WAIT
            if time.monotonic() > until:
                raise TimeoutError("the other process does not come")
            futex.wait(self._address + 4 * theirs, seen, NAP)

    def agree(self, steps: int) -> int:
        """The first process's number, for both."""
        if self._mine == 0:
            self._words[2 * APART] = steps
        self.meet()
        return int(self._words[2 * APART])
