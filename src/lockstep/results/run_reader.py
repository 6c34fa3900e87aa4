"""Run reader: reads a run folder while it is written, each line once.

A last line that is not whole yet is left for the next look. A file that has become shorter is read
anew: `generation` says so to whoever has rows of before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lockstep.errors import RunFolderError
from lockstep.results.charts import Curve, hex_float, mapping, number
from lockstep.results.event_schema import Event, parse_event
from lockstep.results.master_process import lives
from lockstep.results.run_history import RunHistory
from lockstep.results.run_summary import summarise
from lockstep.system.json_files import open_regular
from lockstep.system.private_files import file_stamp

Stamps = dict[str, tuple[int, int, int] | None]
FILES = ("manifest.json", "events.jsonl", "live.jsonl", "result.json")
"""Those that are read."""
MOST_BYTES = 64 << 20
"""Of a file of JSON; a larger one is not read."""
MOST_CHUNK, END_BYTES = 8 << 20, 64 << 10
"""Bytes of events that are read at a time; where the ends are enough, of each end."""


class RunReader:
    """Reads a run folder; `refresh` again and again."""

    def __init__(self, folder: Path, *, ends_only: bool = False) -> None:
        """`ends_only`: of a long list of events only the first and the last are read: enough to say
        what the run is and how it stands."""
        self.folder, self._ends_only = folder, ends_only
        self.generation = 0
        self.history = RunHistory()
        self.manifest: dict[str, Any] = {}
        self.result: dict[str, Any] = {}
        self.live: list[Event] = []
        self.live_seen = 0
        """Grows whenever there is something new that is live."""
        self._at, self._inode = 0, 0
        self._stamps: Stamps = dict.fromkeys(FILES)
        """Those of the files at the last `refresh`."""
        self._without_pace = False

    def refresh(self) -> bool:
        """Read what is new; whether anything is.

        Raises:
            RunFolderError: the folder is gone, or its manifest cannot be read.
        """
        # Before they are read: what is written meanwhile is read next time.
        stamps = self._stamps_now()
        fresh = {name for name in FILES if stamps[name] != self._stamps[name]}
        changed = "manifest.json" in fresh or not self.manifest
        if changed:
            self._read_manifest()
        changed |= self.read_events()
        if "live.jsonl" in fresh:
            self._read_live()
            changed = True
        if "result.json" in fresh:
            self.result, changed = read_object(self.folder / "result.json"), True
        self._stamps = stamps  # all have been read
        untold = self.history.began is None and not self.history.progress.rows
        if untold and not self._without_pace and not self._ends_only:
            self._without_pace = True
            changed |= self._read_losses()
        return changed

    def is_behind(self) -> bool:
        """Whether a file is another than when it was read last: cheap, for who looks often."""
        return self._stamps != self._stamps_now()

    def _stamps_now(self) -> Stamps:
        return {name: file_stamp(self.folder / name) for name in FILES}

    @property
    def status(self) -> str:
        """`finished`, `running`, `paused`, `stopped`, `failed`, `killed`, or `unknown`: it has
        no result, and an older version or another machine has led it."""
        history = self.history
        if self.result or history.finished is not None:
            return "finished"
        if history.ended is not None:
            return history.ended.how if history.ended.how in ("stopped", "failed") else "stopped"
        alive = lives(history.began) if history.began is not None else None
        if alive is None:
            return "unknown"
        if not alive:
            return "killed"
        return "paused" if history.paused_at is not None else "running"

    def summary(self, name: str) -> dict[str, Any]:
        """What the run is and how it stands, by what was read last; `name` is its folder's."""
        return summarise(name, self.manifest, self.result, self.history, self.status)

    def _read_manifest(self) -> None:
        self.manifest = read_object(self.folder / "manifest.json")
        if not self.manifest:
            raise RunFolderError(
                f"{self.folder} is not a run folder",
                expected="a folder with a manifest.json",
                found="none that can be read",
            )

    def read_events(self) -> bool:
        """Read the events that are new; whether there are any."""
        try:
            with open_regular(self.folder / "events.jsonl") as file:
                return self._read_lines(file)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise RunFolderError(f"the events of {self.folder} cannot be read: {error}") from error

    def _read_lines(self, file: BinaryIO) -> bool:
        stat = os.fstat(file.fileno())
        if stat.st_size < self._at or stat.st_ino != self._inode:
            if self._at:
                self.generation += 1
                self.history = RunHistory()
            self._at, self._inode = 0, stat.st_ino
        changed = False
        file.seek(self._at)
        while chunk := file.read(END_BYTES if self._ends_only else MOST_CHUNK):
            whole = chunk[: chunk.rfind(b"\n") + 1]
            if not whole and len(chunk) < END_BYTES:
                break  # the last line is not whole yet
            self._at += len(whole) or len(chunk)  # a line as long as that is none of ours
            if self._ends_only:
                self._at = max(self._at, stat.st_size - END_BYTES)
            file.seek(self._at)
            for line in whole.splitlines():
                event = parse_event(line)
                if event is not None:
                    self.history.add(event)
                    changed = True
        return changed

    def _read_live(self) -> None:
        try:
            with open_regular(self.folder / "live.jsonl") as file:
                lines = file.read(MOST_CHUNK).splitlines()
        except OSError:
            lines = []
        self.live = [event for line in lines if (event := parse_event(line)) is not None]
        self.live_seen += 1

    def _read_losses(self) -> bool:
        """The losses of a run whose events do not tell its pace, from its ledger."""
        curve = Curve()
        for entry in read_lines(self.folder / "ledger.jsonl"):
            step = number(entry.get("step"))
            if step is not None and step >= 0:
                curve.add(int(step), hex_float(entry.get("loss")))
        for part in curve.bins:
            mean = part.total / part.count
            self.history.progress.add(
                None, part.last + 1, mean, part.low, part.high, None, None, None, None
            )
            self.history.step = max(self.history.step, part.last + 1)
        return bool(curve.bins)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none that can be read."""
    try:
        with open_regular(path) as file:
            content = file.read(MOST_BYTES + 1)
        return dict(mapping(json.loads(content))) if len(content) <= MOST_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return {}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a JSON Lines file. Lines that a crash has cut are left out."""
    try:
        with open_regular(path) as lines:
            for line in lines:
                try:
                    value = json.loads(line.decode(errors="replace"))
                except (ValueError, RecursionError):
                    continue
                if isinstance(value, dict):
                    yield value
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read", found=str(error)) from error
