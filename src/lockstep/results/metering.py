"""Metering: what the recorder keeps of a run's pace and times, over intervals that grow with it.

An interval that is kept lasts as long as `keep_seconds` says: one second at first, later a
fixed part of the time so far. A run of a day keeps some 3,100 lines of each kind, and one that
lasts ten times as long some 1,200 more, however many steps these are.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lockstep.results.event_schema import Seconds, Timed
from lockstep.results.ledger import StepRecord
from lockstep.results.run_folder import Events, RunFolder, event_line, utc_now

LIVE_SECONDS = 1.0
"""How often `live.json` is written, and the shortest interval that is kept."""
KEPT_PARTS = 500
"""An interval is at least one part in so many of the time so far."""
MAX_WORKERS, MAX_HOSTS = 4096, 4096
"""More are not metered: other hosts have said that there are so many."""


def keep_seconds(elapsed: float) -> float:
    """How long the interval is that is kept after so many seconds of a run."""
    return max(LIVE_SECONDS, elapsed / KEPT_PARTS)


@dataclass(slots=True)
class Pace:
    """Pace: committed steps of an interval, with the sum and the range of their losses."""

    steps: int = 0
    samples: int = 0
    finite: int = 0
    """How many of them have a loss that is a finite number."""
    total: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    norms: int = 0
    norm: float = 0.0
    lr: float | None = None
    """That of the last step."""

    def add(self, record: StepRecord) -> None:
        """Add a committed step."""
        self.steps += 1
        self.samples += record.samples
        self.lr = record.lr
        loss = record.loss
        if math.isfinite(loss):
            self.finite += 1
            self.total += loss
            self.low, self.high = min(self.low, loss), max(self.high, loss)
        if record.norm is not None and math.isfinite(record.norm):
            self.norms += 1
            self.norm += record.norm

    def absorb(self, other: Pace) -> None:
        """Add the interval that follows."""
        self.steps += other.steps
        self.samples += other.samples
        self.finite += other.finite
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.norms += other.norms
        self.norm += other.norm
        self.lr = other.lr if other.steps else self.lr

    def fields(self, step: int, seconds: float, workers: int) -> dict[str, Any]:
        """The fields of the event `progressed` (see `event_schema`)."""
        finite = self.finite > 0
        return {
            "step": step,
            "steps": self.steps,
            "samples": self.samples,
            "seconds": round(seconds, 4),
            "loss": _rounded(self.total / self.finite) if finite else None,
            "low": _rounded(self.low) if finite else None,
            "high": _rounded(self.high) if finite else None,
            **({"norm": _rounded(self.norm / self.norms)} if self.norms else {}),
            **({} if self.lr is None or not math.isfinite(self.lr) else {"lr": _rounded(self.lr)}),
            "workers": workers,
        }


def _rounded(value: float) -> float:
    """Seven digits: the ledger has all of them."""
    return float(f"{value:.7g}")


@dataclass(slots=True)
class HostTimes:
    """Host times: what the workers of one host have spent an interval on."""

    seconds: float = 0.0
    workers: dict[int, list[float]] = field(default_factory=dict)
    memory: dict[int, int] = field(default_factory=dict)
    """Bytes, by worker, as told last."""
    until: str = ""
    """The UTC time at which it ended, which is before that of its writing."""

    def add(self, timed: Timed) -> None:
        """Add the interval that follows; it ends now."""
        self.seconds += timed.seconds
        self.until = utc_now()
        self.memory = {**self.memory, **timed.memory}
        for worker, spent in timed.workers.items():
            row = self.workers.setdefault(worker, [0.0] * len(Seconds.__struct_fields__))
            for index, name in enumerate(Seconds.__struct_fields__):
                row[index] += getattr(spent, name)

    def absorb(self, other: HostTimes) -> None:
        """Add the interval that follows."""
        self.seconds += other.seconds
        self.until = other.until
        self.memory = {**self.memory, **other.memory}
        for worker, spent in other.workers.items():
            row = self.workers.setdefault(worker, [0.0] * len(spent))
            self.workers[worker] = [a + b for a, b in zip(row, spent, strict=True)]

    def fields(self, host: str) -> dict[str, Any]:
        """The fields of the event `timed`."""
        rows = {
            str(worker): [round(value, 4) for value in row] for worker, row in self.workers.items()
        }
        return {
            "time": self.until,
            "host": host,
            "seconds": round(self.seconds, 4),
            "workers": rows,
            **({"memory": self.memory} if self.memory else {}),
        }


def checked_times(fields: Mapping[str, Any]) -> Timed | None:
    """What a host says its workers have spent their time on; None if it cannot be."""
    try:
        timed = msgspec.convert(dict(fields), Timed, strict=False)
    except msgspec.ValidationError:
        return None
    values = [
        getattr(row, name) for row in timed.workers.values() for name in row.__struct_fields__
    ]
    usable = all(math.isfinite(value) and 0 <= value <= 1e9 for value in (*values, timed.seconds))
    usable &= all(0 <= value < 1 << 60 for value in timed.memory.values())
    few = max(len(timed.workers), len(timed.memory)) <= MAX_WORKERS
    return timed if usable and few and timed.host else None


class Meter:
    """Meter: gathers the pace and the times of a run, and writes them where and when it is due.

    What has happened since the last look goes to the run folder's `live.jsonl`, which has the form
    of `events.jsonl` and is replaced each time; whole intervals go to the events.
    """

    def __init__(
        self,
        folder: RunFolder,
        events: Events,
        step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`step`: after how many steps the state is."""
        self._folder, self._events, self._clock = folder, events, clock
        self._step, self._workers = step, 0
        self._begun = self._looked = self._kept = clock()
        self._pace, self._kept_pace = Pace(), Pace()
        self._times: dict[str, HostTimes] = {}
        self._kept_times: dict[str, HostTimes] = {}

    def commit(self, record: StepRecord) -> None:
        """A step has been committed."""
        self._pace.add(record)
        self._step = record.step + 1

    def timed(self, fields: Mapping[str, Any]) -> None:
        """The workers of a host have told what they spend their time on."""
        timed = checked_times(fields)
        if timed is None or timed.host is None:
            return
        if len(self._times) < MAX_HOSTS or timed.host in self._times:
            self._times.setdefault(timed.host, HostTimes()).add(timed)

    def look(self, workers: int) -> None:
        """Write what is due. Called about every tick; `workers` take part on this host."""
        self._workers = workers
        now = self._clock()
        if now - self._looked >= LIVE_SECONDS:
            self._tick(now, now - self._kept >= keep_seconds(now - self._begun))

    def flush(self) -> None:
        """Write what there is, at the run's end or at a rest."""
        self._tick(self._clock(), True)

    def close(self) -> None:
        """There is nothing live any more."""
        with contextlib.suppress(OSError):
            self._folder.live_path.unlink(missing_ok=True)

    def _tick(self, now: float, keep: bool) -> None:
        fresh = [("progressed", self._pace.fields(self._step, now - self._looked, self._workers))]
        fresh += [("timed", times.fields(host)) for host, times in self._times.items()]
        self._kept_pace.absorb(self._pace)
        for host, times in self._times.items():
            self._kept_times.setdefault(host, HostTimes()).absorb(times)
        if keep:
            self._keep(now)
        else:
            self._write_live(fresh)
        self._looked, self._pace, self._times = now, Pace(), {}

    def _keep(self, now: float) -> None:
        if self._kept_pace.steps:
            fields = self._kept_pace.fields(self._step, now - self._kept, self._workers)
            self._events.add("progressed", **fields)
        for host, times in self._kept_times.items():
            self._events.add("timed", **times.fields(host))
        self._kept, self._kept_pace, self._kept_times = now, Pace(), {}

    def _write_live(self, fresh: list[tuple[str, dict[str, Any]]]) -> None:
        """Replace the live file. Nobody needs it for the result, so what fails is left out."""
        path = self._folder.live_path
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            partial.write_text("".join(event_line(name, fields) for name, fields in fresh))
            partial.rename(path)
