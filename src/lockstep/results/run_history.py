"""Run history: the events of a run folded into rows that page, report and terminal show.

Pure. Rows are only ever appended, so that whoever has seen so many of a table asks for the rest.
Times are seconds of the run: the time between a stop and a resume is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec

from lockstep.results import event_schema as kind
from lockstep.results.event_schema import Event, name_of
from lockstep.results.event_words import describe_event
from lockstep.results.recoveries import describe_recovery

PHASES = kind.Seconds.__struct_fields__
"""What workers spend their time on, in the order of the rows."""
GAP_SECONDS = 1.0
"""What is left of the time between a stop and a resume."""
ADJOINING = 0.25
"""Intervals of a lane with a gap of less than this part between them adjoin: they are told a moment
after they end."""
LAST_EVENTS = 500
"""So many rows of events are kept: the newest."""
Lane = tuple[str, int]
"""A worker: its host and its id."""


class Table:
    """Table: rows that are appended, and counted from the first; `most` of them are kept."""

    def __init__(self, most: int | None = None) -> None:
        self.rows: list[list[Any]] = []
        self.dropped, self._most = 0, most

    def __len__(self) -> int:
        return self.dropped + len(self.rows)

    def add(self, *row: Any) -> None:
        """Append a row."""
        self.rows.append(list(row))
        if self._most is not None and len(self.rows) > 2 * self._most:
            self.dropped += len(self.rows) - self._most
            del self.rows[: -self._most]

    def since(self, count: int) -> list[list[Any]]:
        """The rows after the first so many."""
        return self.rows[max(count - self.dropped, 0) :]


@dataclass(kw_only=True)
class RunHistory:
    """Run history: what has happened in a run, as tables and as facts of now."""

    progress: Table = field(default_factory=Table)
    """`[time, step, loss, low, high, samples a second, gradient norm, workers, learning rate]`"""
    memory: Table = field(default_factory=Table)
    """`[time, step, mean, low, high]`: bytes that a worker has of its own, over those that work"""
    evaluations: Table = field(default_factory=Table)
    """`[time, step, metrics]`"""
    marks: Table = field(default_factory=Table)
    """`[time, step, kind, text]`: deaths, joins, scalings, ..."""
    lanes: Table = field(default_factory=Table)
    """`[host, worker]`; others name a lane by its number"""
    times: Table = field(default_factory=Table)
    """`[lane, from, to, seconds by phase]`"""
    states: Table = field(default_factory=Table)
    """`[lane, time, state]`: starting, working, dead, left"""
    bands: Table = field(default_factory=Table)
    """`[from, to, kind, text]`: recovering, checkpoint, paused"""
    events: Table = field(default_factory=lambda: Table(LAST_EVENTS))
    """`[time, UTC, name, text]`"""

    master: str = ""
    """The name of the master's host."""
    began: kind.Began | None = None
    """The master that has led the run last."""
    first: kind.Began | None = None
    planned: kind.Planned | None = None
    """How the run was planned."""
    ended: kind.Ended | None = None
    finished: kind.Finished | None = None
    paused_at: float | None = None
    started: str = ""
    """The UTC time of the first event."""
    step: int = 0
    """After how many steps the run is, as far as it has told."""
    target: int | None = None
    """The number of workers asked for last."""
    now: float = 0.0
    """The time of the last event."""
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    verified: list[kind.Verified] = field(default_factory=list)
    _clock: float | None = None
    _shift: float = 0.0
    _numbers: dict[Lane, int] = field(default_factory=dict)
    _state: dict[Lane, str] = field(default_factory=dict)
    _spawned: dict[int, float] = field(default_factory=dict)
    _members: dict[str, set[int]] = field(default_factory=dict)
    _hosts: set[str] = field(default_factory=set)
    _told_to: dict[int, float] = field(default_factory=dict)
    _memory: dict[Lane, int] = field(default_factory=dict)

    # Facts of now.

    @property
    def working(self) -> list[Lane]:
        """The workers that take part now."""
        return [lane for lane, state in self._state.items() if state == "working"]

    def states_now(self) -> list[tuple[Lane, str]]:
        """Each worker that there has been, and what it is now."""
        return sorted(self._state.items())

    def live_rows(self, events: Sequence[Event]) -> dict[str, list[list[Any]]]:
        """The rows of `progress` and `times` for what is under way: of events that are not kept."""
        rows: dict[str, list[list[Any]]] = {"progress": [], "times": []}
        for event in events:
            at = self._time(event)
            if isinstance(event, kind.Progressed) and event.steps:
                rows["progress"].append(_progress_row(at, event))
            elif isinstance(event, kind.Timed):
                rows["times"] += [
                    [self._numbers[event.host or self.master, worker], *_times_row(at, event, row)]
                    for worker, row in event.workers.items()
                    if (event.host or self.master, worker) in self._numbers
                ]
        return rows

    # Events.

    def add(self, event: Event) -> None:
        """Fold in the next event."""
        if isinstance(event, kind.Began):
            self._begin(event)
        # Somebody may have replayed the run long after its end.
        at = self.now if isinstance(event, kind.Verified) else self._time(event)
        self.now = max(self.now, at)
        match event:
            case kind.Progressed():
                self.step = event.step
                if event.steps:
                    self.progress.add(*_progress_row(at, event))
                return
            case kind.Timed():
                for worker, row in event.workers.items():
                    lane = self._lane(event.host or self.master, worker)
                    self.times.add(lane, *self._adjoined(lane, _times_row(at, event, row)))
                self._remember_memory(at, event)
                return
            case kind.Evaluated():
                self.step = max(self.step, event.step)
                self.evaluations.add(at, event.step, event.metrics)
            case kind.Resumed():
                self.step = event.step
                self._mark(at, "resumed", f"resumed from step {event.step:,}")
            case kind.Checkpointed():
                self.checkpoints.append(event.step)
                text = f"checkpoint after step {event.step:,}"
                self.bands.add(max(at - event.seconds, 0.0), at, "checkpoint", text)
            case kind.Planned():
                self.planned = event
            case kind.Verified():
                self.verified.append(event)
            case kind.Requested(request="scale"):
                self.target = event.number
                self._mark(at, "scaled", f"scaled to {event.number} workers")
            case kind.Paused():
                self.paused_at = at
            case kind.WentOn():
                self._unpause(at)
            case kind.Finished() | kind.Ended():
                self._end(at, event)
            case _:
                self._of_workers(at, event)
        self.events.add(at, event.time, name_of(event), describe_event(event, self.master))

    def _of_workers(self, at: float, event: Event) -> None:
        host = event.host or self.master
        match event:
            case kind.Spawned():
                self._spawned[event.pid] = at
            case kind.Joined():
                if event.pid in self._spawned and event.host:
                    # Other hosts' forks are told with their name, the master's own without.
                    self.master = self.master if self._members else event.host
                self._set_state(host, event.worker, self._spawned.pop(event.pid, at), "starting")
            case kind.Formed():
                self._form(at, host, event)
            case kind.Dismissed():
                self._set_state(host, event.worker, at, "left")
            case kind.Died():
                self.step = max(self.step, event.step)
                self._set_state(host, event.worker, at, "dead")
                self._mark(at, "died", describe_event(event, self.master), event.step)
            case kind.Recovered():
                self._recover(at, event)
            case kind.HostLost():
                for lane in self.working:
                    if lane[0] == host:
                        self._set_state(*lane, at, "dead")
                self._members.pop(host, None)
                self._mark(at, "died", f"host {host} was lost: {event.why}")
            case kind.Hosts(going_on=True):
                for name in set(event.hosts) - self._hosts if self._hosts else ():
                    self._mark(at, "joined", f"host {name} joined")
                self._hosts = set(event.hosts)
            case kind.Regrouped():
                begun = max(at - event.stalled_ms / 1e3, 0.0)
                self.bands.add(begun, at, "recovering", "the hosts regroup")
            case kind.Corrupt():
                self._mark(at, "corrupt", describe_event(event, self.master), event.step)

    def _remember_memory(self, at: float, event: kind.Timed) -> None:
        for worker, size in event.memory.items():
            self._memory[event.host or self.master, worker] = size
        sizes = [size for lane, size in self._memory.items() if self._state.get(lane) == "working"]
        if event.memory and sizes:
            mean = sum(sizes) // len(sizes)
            self.memory.add(at, self.step, mean, min(sizes), max(sizes))

    def _adjoined(self, lane: int, row: list[Any]) -> list[Any]:
        """A row of times, from the end of the one before where it begins just after that."""
        before = self._told_to.get(lane, 0.0)
        if 0.0 < row[0] - before < ADJOINING * (row[1] - row[0]):
            row[0] = before
        self._told_to[lane] = row[1]
        return row

    def _begin(self, event: kind.Began) -> None:
        clock = _seconds(event.time)
        if self.began is not None and self._clock is not None and clock is not None:
            self._end(self.now, None)
            self._shift = clock - self._clock - self.now - GAP_SECONDS
        self.first = self.first or event
        self.began, self.ended, self.target, self.planned = event, None, None, None
        self.master = event.host or ""
        self._members.clear()
        self._hosts.clear()

    def _form(self, at: float, host: str, event: kind.Formed) -> None:
        before = self._members.get(host)
        for worker in event.seats:
            self._set_state(host, worker, at, "working")
            if before is not None and worker not in before:
                where = f" of {host}" if host != self.master else ""
                self._mark(at, "joined", f"worker {worker}{where} joined", event.step)
        self._members[host] = set(event.seats)

    def _recover(self, at: float, event: kind.Recovered) -> None:
        fields = {name: getattr(event, name) for name in event.__struct_fields__ if name != "time"}
        self.recoveries.append({**fields, "at": at})
        begun = max(at - event.recovery_ms / 1e3, 0.0)
        self.bands.add(begun, at, "recovering", describe_recovery(fields))

    def _end(self, at: float, event: kind.Finished | kind.Ended | None) -> None:
        for lane in list(self._state):
            if self._state[lane] not in ("left", "dead"):
                self._set_state(*lane, at, "left")
        self._unpause(at)
        if isinstance(event, kind.Finished):
            self.finished, self.step = event, event.steps
        elif event is not None:
            self.ended = event
            self._mark(at, "ended", f"{event.how} after step {event.step:,}", event.step)

    def _unpause(self, at: float) -> None:
        if self.paused_at is not None:
            self.bands.add(self.paused_at, at, "paused", "paused, as asked")
            self.paused_at = None

    def _mark(self, at: float, what: str, text: str, step: int | None = None) -> None:
        self.marks.add(at, self.step if step is None else step, what, text)

    def _set_state(self, host: str, worker: int, at: float, state: str) -> None:
        lane = self._lane(host, worker)
        if self._state.get((host, worker)) != state:
            self._state[host, worker] = state
            if state in ("dead", "left"):
                self._members.get(host, set()).discard(worker)
            self.states.add(lane, at, state)

    def _lane(self, host: str, worker: int) -> int:
        number = self._numbers.get((host, worker))
        if number is None:
            number = self._numbers[host, worker] = len(self.lanes)
            self.lanes.add(host, worker)
        return number

    def _time(self, event: Event) -> float:
        clock = _seconds(event.time)
        if clock is None:
            return self.now
        if self._clock is None:
            self._clock, self.started = clock, event.time
        return round(max(clock - self._clock - self._shift, 0.0), 3)


def _progress_row(at: float, event: kind.Progressed) -> list[Any]:
    rate = event.samples / event.seconds if event.seconds > 0 else None
    rate = None if rate is None else round(rate, 2)
    return [
        at, event.step, event.loss, event.low, event.high, rate, event.norm, event.workers,
        event.lr,
    ]  # fmt: skip


def _times_row(at: float, event: kind.Timed, row: kind.Seconds) -> list[Any]:
    return [round(max(at - event.seconds, 0.0), 3), at, list(msgspec.structs.astuple(row))]


def _seconds(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None


def latest(rows: Sequence[Sequence[Any]]) -> list[Sequence[Any]]:
    """Rows with a step in second place, without those that a resume has made void."""
    kept: list[Sequence[Any]] = []
    least = None
    for row in reversed(rows):
        if least is None or row[1] < least:
            kept.append(row)
            least = row[1]
    return kept[::-1]


def thin_times(rows: Sequence[Sequence[Any]], most: int) -> list[list[Any]]:
    """Rows of `times`, neighbours of a lane merged until there are at most about so many."""
    every = -(-len(rows) // most)
    if every <= 1:
        return [list(row) for row in rows]
    merged: list[list[Any]] = []
    pending: dict[int, list[Any]] = {}
    counts: dict[int, int] = {}
    for lane, begun, ended, spent in rows:
        row = pending.get(lane)
        if row is None:
            row = pending[lane] = [lane, begun, ended, [0.0] * len(spent)]
            counts[lane] = 0
            merged.append(row)
        row[2] = ended
        row[3] = [a + b for a, b in zip(row[3], spent, strict=True)]
        counts[lane] += 1
        if counts[lane] == every:
            del pending[lane]
    for row in merged:
        row[3] = [round(seconds, 3) for seconds in row[3]]
    return merged
