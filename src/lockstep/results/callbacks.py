"""Callbacks: a user's observers of a run. Nothing that they do comes back to it.

Each has a thread of its own in the coordinator's process, and a queue of what it has not heard yet.
The queue is bounded: a callback that is slower than the run misses steps, and how many is said.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from lockstep.errors import JobError

if TYPE_CHECKING:
    from lockstep.results.ledger import StepRecord
    from lockstep.results.result import Result

MOST_WAITING = 10_000
"""How much may wait for a callback; what comes then is not passed on."""
STEPS_AT_ONCE = 1_000
"""So many steps are passed on before `steps_per_second` limits them: short runs are told whole."""
END_SECONDS = 10.0
"""How long callbacks may take to hear the rest, when a run has ended."""


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """A run that begins, or goes on."""

    name: str
    folder: Path
    """Absolute."""
    step: int
    """After how many steps it begins: 0, or where it was resumed."""
    steps: int
    """Those that are planned."""
    settings: Mapping[str, Any]
    """The job's, by name."""
    args: Mapping[str, Any]
    """The arguments of the recipe or the task."""
    plan: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """A committed step. Each is told of once, in order."""

    step: int
    """Its number, from 0."""
    data_epoch: int
    samples: int
    metrics: Mapping[str, float]
    """`loss`, `norm` where it is limited, and what `Task.loss` returns beside the loss."""


@dataclass(frozen=True, kw_only=True)
class EvaluationDone:
    """An evaluation of the held-out data."""

    step: int
    """After how many steps."""
    data_epoch: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class EventHappened:
    """A line of the run's events.jsonl."""

    name: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunEnded:
    """A run that has ended, or was stopped."""

    result: Result | None
    """None: it did not come to its end."""
    error: str
    """What has ended it; "": nothing has."""


class Callback:
    """Callback: watches a run. Define the methods for what it is to hear of.

    They are called in a thread of the process that called `run`, one after the other, with copies:
    they change no bit of the run, and do not slow it down. One that raises is reported by name and
    hears no more; the run goes on. One that is slower than the run misses steps, and the run says
    how many. They must not change what belongs to the whole process, such as its working directory.

    Each call takes the coordinator some 20 us: with thousands of steps a second that slows the run
    down. `steps_per_second` limits how many steps are told of.
    """

    steps_per_second: float | None = None
    """How many steps `on_step` is told of in a second, after the first 1,000: those in between are
    left out, and the last one before an evaluation or the end is not. None: all are told."""

    def on_start(self, run: RunStarted) -> None:
        """A run begins, or is resumed: then steps after its checkpoint come again."""

    def on_step(self, step: StepDone) -> None:
        """A step is committed (see `steps_per_second`)."""

    def on_evaluation(self, evaluation: EvaluationDone) -> None:
        """The held-out data were evaluated."""

    def on_event(self, event: EventHappened) -> None:
        """Something happened: a worker died, a checkpoint was written, ... All that `events.jsonl`
        tells comes here but the pace, which steps tell."""

    def on_end(self, end: RunEnded) -> None:
        """The run has ended: well, by an error, or since it was stopped."""


Method = Literal["on_start", "on_step", "on_evaluation", "on_event", "on_end"]


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Check what `run` was given.

    Raises:
        JobError: one is no callback.
    """
    for each in callbacks:
        if not isinstance(each, Callback):
            raise JobError(
                "a callback is none",
                expected="an object of a subclass of lockstep.Callback",
                found=repr(each)[:200],
                fix="subclass it, define on_step or others, and give callbacks=[Mine()]",
            )


class StepAllowance:
    """Step allowance: how many steps may be passed on now (a token bucket).

    It begins with `STEPS_AT_ONCE`, which is also the most that it holds, and grows by so many a
    second.
    """

    def __init__(
        self, steps_per_second: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`steps_per_second`: None allows any number."""
        self._rate, self._clock = steps_per_second, clock
        self._left, self._looked = float(STEPS_AT_ONCE), clock()

    def take(self) -> bool:
        """Whether one more may be passed on, which then counts as passed on."""
        if self._rate is None:
            return True
        now = self._clock()
        self._left = min(self._left + (now - self._looked) * self._rate, STEPS_AT_ONCE)
        self._looked = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class CallbackThread:
    """One callback, and the thread in which it is called."""

    def __init__(self, callback: Callback) -> None:
        self.name = type(callback).__name__
        self.missed = 0
        """How many steps and events were not passed on, since too many waited."""
        self.failure: str | None = None
        """What it has raised, where it was; until `pop_failure`."""
        self._callback = callback
        self._allowance = StepAllowance(callback.steps_per_second)
        self._left_out: StepRecord | None = None
        """The last step, where it was not passed on."""
        self._waiting: deque[tuple[Method, object]] = deque()
        self._news = threading.Condition()
        self._ended = self._given_up = False
        self._defined = {
            method
            for method in ("on_start", "on_step", "on_evaluation", "on_event", "on_end")
            if getattr(type(callback), method) is not getattr(Callback, method)
        }
        self._thread = threading.Thread(
            target=self._run, name=f"lockstep callback {self.name}", daemon=True
        )
        self._thread.start()

    def hears(self, method: Method) -> bool:
        """Whether the callback wants to hear of this."""
        return method in self._defined

    def step(self, record: StepRecord) -> None:
        """Pass a committed step on, where it may be."""
        if "on_step" not in self._defined:
            return
        if self._allowance.take():
            self._left_out = None
            self.tell("on_step", _step_done(record))
        else:
            self._left_out = record

    def tell(self, method: Method, news: object) -> None:
        """Pass something on; returns at once."""
        if method in ("on_evaluation", "on_end") and self._left_out is not None:
            record, self._left_out = self._left_out, None
            self.tell("on_step", _step_done(record))
        if method not in self._defined:
            return
        with self._news:
            if self._given_up:
                return
            if len(self._waiting) >= MOST_WAITING and method in ("on_step", "on_event"):
                self.missed += 1
                return
            self._waiting.append((method, news))
            self._news.notify()

    def pop_failure(self) -> str | None:
        """What it has raised since the last call."""
        failure, self.failure = self.failure, None
        return failure

    def end(self) -> None:
        """Nothing more is told: the thread ends when it has passed on what waits."""
        with self._news:
            self._ended = True
            self._news.notify()

    def ended_within(self, seconds: float) -> bool:
        """Whether it has heard everything within so many seconds; if not, it hears no more."""
        self._thread.join(max(0.0, seconds))
        if not self._thread.is_alive():
            return True
        with self._news:
            self.missed += len(self._waiting)
            self._waiting.clear()
            self._given_up = True
            self._news.notify()
        return False

    def _run(self) -> None:
        while True:
            with self._news:
                while not self._waiting:
                    if self._ended or self._given_up:
                        return
                    self._news.wait()
                method, news = self._waiting.popleft()
            try:
                getattr(self._callback, method)(news)
            except BaseException as error:  # whatever it is, it is no error of the run
                with self._news:
                    self._waiting.clear()
                    self._given_up = True
                self.failure = f"{self.name}.{method}: {type(error).__name__}: {error}"
                return


class CallbackThreads:
    """All callbacks of a run."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._threads = [CallbackThread(callback) for callback in callbacks]
        self._hear_events = any(thread.hears("on_event") for thread in self._threads)

    def start(self, run: RunStarted) -> None:
        """The run begins."""
        self._tell("on_start", run)

    def step(self, record: StepRecord) -> None:
        """A step is committed."""
        for thread in self._threads:
            thread.step(record)

    def evaluated(self, step: int, data_epoch: int, metrics: Mapping[str, float]) -> None:
        """The held-out data were evaluated."""
        done = EvaluationDone(step=step, data_epoch=data_epoch, metrics=frozen(metrics))
        self._tell("on_evaluation", done)

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Something happened."""
        if self._hear_events:
            self._tell("on_event", EventHappened(name=name, fields=frozen(fields)))

    def failures(self) -> list[str]:
        """What callbacks have raised since the last call."""
        found = (thread.pop_failure() for thread in self._threads)
        return [failure for failure in found if failure is not None]

    def end(self, ended: RunEnded) -> list[str]:
        """The run has ended; what there is to say of callbacks that have not heard everything."""
        if ended.result is not None:  # the caller has it, too
            ended = dataclasses.replace(ended, result=copy.deepcopy(ended.result))
        self._tell("on_end", ended)
        for thread in self._threads:
            thread.end()
        limit = time.monotonic() + END_SECONDS
        notes = []
        for thread in self._threads:
            if not thread.ended_within(limit - time.monotonic()):
                notes.append(f"{thread.name} did not return within {END_SECONDS:g} s")
            if thread.missed:
                notes.append(
                    f"{thread.name} was too slow: {thread.missed:,} steps and events were not "
                    "passed on"
                )
        return notes

    def _tell(self, method: Method, news: object) -> None:
        for thread in self._threads:
            thread.tell(method, news)


def _step_done(record: StepRecord) -> StepDone:
    norm = {} if record.norm is None else {"norm": record.norm}
    return StepDone(
        step=record.step,
        data_epoch=record.data_epoch,
        samples=record.samples,
        metrics=MappingProxyType({"loss": record.loss, **norm, **record.logged}),
    )


def frozen(value: Any) -> Any:
    """A copy of what JSON can hold that cannot be changed."""
    if isinstance(value, Mapping):
        return MappingProxyType({name: frozen(each) for name, each in value.items()})
    if isinstance(value, list | tuple):
        return tuple(frozen(each) for each in value)
    return value
