"""Counted report: the first connections of a minute that are refused or lost are told of one by
one, and the rest by their number. So nobody can fill a log by connecting again and again."""

from __future__ import annotations

import threading
import time

from lockstep.net.transport import Report

LISTED = 100
"""Of each host, and of all strangers together, in a minute."""
PERIOD_SECONDS = 60.0
MAX_NAMES = 1024
STRANGERS = "strangers"


class CountedReport:
    """A `Report` that passes a bounded number on to another one."""

    def __init__(self, report: Report, listed: int | None = None) -> None:
        self._report = report
        self._listed = LISTED if listed is None else listed
        self._lock = threading.Lock()
        self._since = time.monotonic()
        self._heard: dict[str, int] = {}
        """In this period: by host, how often there was something to tell of it."""

    def __call__(self, who: str, why: str) -> None:
        self.flush()
        name = STRANGERS if ":" in who else who  # an address has a port
        with self._lock:
            if name not in self._heard and len(self._heard) >= MAX_NAMES:
                name = STRANGERS
            self._heard[name] = self._heard.get(name, 0) + 1
            listed = self._heard[name] <= self._listed
        if listed:
            self._report(who, why)

    def flush(self, *, at_once: bool = False) -> None:
        """Tell of the rest of a period that is over, or `at_once`."""
        with self._lock:
            now = time.monotonic()
            if not at_once and now - self._since < PERIOD_SECONDS:
                return
            heard, seconds = self._heard, now - self._since
            self._heard, self._since = {}, now
        for name, count in heard.items():
            if (more := count - self._listed) > 0:
                self._report(name, f"{more:,} more were refused or lost within {seconds:.0f} s")
