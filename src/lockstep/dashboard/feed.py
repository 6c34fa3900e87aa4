"""Feed: one run for all who watch it: looks for what is new, and says what each has not seen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from lockstep.results.ledger_check import LedgerCheck
from lockstep.results.run_history import Table, thin_times
from lockstep.results.run_reader import RunReader
from lockstep.results.run_summary import LIVE, details

LOOK_SECONDS = 0.1
"""How often the folder is looked at while somebody watches."""
FACTS_SECONDS = 1.0
"""How often it is asked whether the master lives, though nothing is new."""
LEDGER_SECONDS = 10.0
"""How often a part of the ledger is checked while the run goes on: it has the cores."""
MOST_TIMES = 8000
"""Rows of times that a page gets at first; neighbours are merged until there are no more."""
BEAT_SECONDS = 5.0
"""A watcher hears something at least this often."""
TABLES = (
    "progress",
    "evaluations",
    "marks",
    "lanes",
    "times",
    "states",
    "bands",
    "events",
    "memory",
)


class Feed:
    """Feed: reads a run, as long as somebody watches it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._reader = name, RunReader(folder)
        self._ledger = LedgerCheck(folder / "ledger.jsonl")
        self._lock = asyncio.Lock()
        self._looked = self._checked = self._told = 0.0
        self._facts: dict[str, Any] = {}
        self._version = 0
        """Grows whenever there is something new."""

    async def watch(self, closing: Callable[[], bool]) -> AsyncIterator[dict[str, Any]]:
        """What there is, and then whatever is new, until the server closes.

        Raises:
            LockstepError: the run cannot be read.
        """
        seen = Seen()
        while True:
            last = closing()
            async with self._lock:
                await self._look(at_once=last)
                message = seen.news(self._reader, self._facts, self._version)
            if message or seen.quiet_for() > BEAT_SECONDS:
                seen.told_at = time.monotonic()
                yield {**message, "closing": True} if last else message
            if last:
                return
            await asyncio.sleep(LOOK_SECONDS)

    async def whole(self) -> dict[str, Any]:
        """What there is now."""
        async with self._lock:
            await self._look(at_once=True)
            return Seen().news(self._reader, self._facts, self._version)

    async def _look(self, *, at_once: bool) -> None:
        """Look for what is new, unless somebody has just done so."""
        now = time.monotonic()
        if now - self._looked < 0.9 * LOOK_SECONDS and not at_once:
            return
        self._looked = now
        due = at_once or now - self._told >= FACTS_SECONDS
        # The run has the cores: a look that finds nothing must cost nothing worth a thread.
        if (due or self._reader.is_behind()) and await asyncio.to_thread(self._read, now):
            self._version += 1

    def _read(self, now: float) -> bool:
        changed = self._reader.refresh()
        if now - self._checked >= (LEDGER_SECONDS if self._facts.get("status") in LIVE else 0.0):
            changed |= self._ledger.advance()
            self._checked = now
        if not changed and now - self._told < FACTS_SECONDS:
            return False
        self._told = now
        facts = self._describe()
        changed |= facts != self._facts
        self._facts = facts
        return changed

    def _describe(self) -> dict[str, Any]:
        ledger, facts = self._ledger, self._reader.summary(self.name)
        facts["ledger"] = {
            "steps": ledger.steps, "broken": ledger.broken, "whole": ledger.whole
        }  # fmt: skip
        return facts


class Seen:
    """Seen: what a watcher has got so far."""

    def __init__(self) -> None:
        self._generation = -1
        self._rows = dict.fromkeys(TABLES, 0)
        self._version = self._live = -1
        self.told_at = time.monotonic()

    def quiet_for(self) -> float:
        """The seconds since it was told anything."""
        return time.monotonic() - self.told_at

    def news(self, reader: RunReader, facts: dict[str, Any], version: int) -> dict[str, Any]:
        """What it has not got yet; empty: nothing."""
        if version == self._version:
            return {}
        self._version = version
        message: dict[str, Any] = {"facts": facts}
        if reader.generation != self._generation:
            self._generation = reader.generation
            self._rows = dict.fromkeys(TABLES, 0)
            self._live = -1
            message |= {"anew": True, "details": details(reader.manifest)}
        message["rows"] = rows = {}
        for name in TABLES:
            table: Table = getattr(reader.history, name)
            if len(table) > self._rows[name]:
                fresh = table.since(self._rows[name])
                rows[name] = thin_times(fresh, MOST_TIMES) if name == "times" else fresh
                self._rows[name] = len(table)
        if reader.live_seen != self._live:
            self._live = reader.live_seen
            message["live"] = reader.history.live_rows(reader.live)
        return message
