"""Callbacks: they see the run as its records have it, and whatever they do, it is the same run."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.errors import JobError, LockstepError, StoppedError
from lockstep.job.faults import Fault
from lockstep.results import callbacks as callbacks_module
from lockstep.results.callbacks import CallbackThread, StepDone
from tests.support.harmed_runs import Yard, assert_same, events, yard
from tests.support.logging_task import BATCH, Logs

__all__ = ["yard"]  # a fixture

SETTINGS: dict[str, Any] = {"batch_size": BATCH, "steps": 12, "seed": 3}


class Watches(lockstep.Callback):
    """Keeps all that it hears, and from which thread."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []
        self.threads: set[str] = set()

    def _hear(self, what: str, news: Any) -> None:
        self.heard.append((what, news))
        self.threads.add(threading.current_thread().name)

    def on_start(self, run: Any) -> None:
        self._hear("start", run)

    def on_step(self, step: Any) -> None:
        self._hear("step", step)

    def on_evaluation(self, evaluation: Any) -> None:
        self._hear("evaluation", evaluation)

    def on_event(self, event: Any) -> None:
        self._hear("event", event)

    def on_end(self, end: Any) -> None:
        self._hear("end", end)

    def of(self, what: str) -> list[Any]:
        return [news for kind, news in self.heard if kind == what]


def test_what_it_hears_is_what_is_recorded(yard: Yard) -> None:
    watches = Watches()
    fault = Fault(worker_id=1, step=4, phase="update_done")
    result = yard.run(Logs(), workers=2, callbacks=[watches], faults=(fault,), **SETTINGS)
    assert_same(result, yard.undisturbed(Logs(), **SETTINGS))
    kinds = [kind for kind, _ in watches.heard]
    assert (kinds[0], kinds[-1]) == ("start", "end")
    (start,), (end,) = watches.of("start"), watches.of("end")
    assert (start.folder, start.name) == (result.folder.absolute(), result.folder.name)
    assert (start.step, start.steps, start.settings["seed"]) == (0, 12, 3)
    assert (end.result, end.error) == (result, "")
    table = result.steps_table()
    steps = watches.of("step")
    for name in ("step", "data_epoch", "samples"):
        assert [getattr(step, name) for step in steps] == table[name]
    for name in ("loss", "accuracy", "größe", "noisy", "weight"):
        assert [step.metrics[name] for step in steps] == table[name]
    assert [
        {"step": each.step, "data_epoch": each.data_epoch, "metrics": dict(each.metrics)}
        for each in watches.of("evaluation")
    ] == result.history
    told = [event.name for event in watches.of("event")]
    pace = ("progressed", "timed")  # steps are told one by one
    written = [event["event"] for event in events(result.folder)]
    assert told == [name for name in written if name not in pace]
    assert "died" in told
    assert watches.threads == {"lockstep callback Watches"}


def test_it_cannot_change_what_it_hears() -> None:
    news = callbacks_module.frozen({"a": [1, {"b": 2.0}]})
    with pytest.raises(TypeError):
        news["a"] = 1
    with pytest.raises(TypeError):
        news["a"][1]["b"] = 3
    step = StepDone(step=0, data_epoch=0, samples=1, metrics=callbacks_module.frozen({"loss": 1.0}))
    with pytest.raises(AttributeError):
        step.step = 1  # type: ignore[misc]


class Harms(lockstep.Callback):
    """Tries to end or change the run, in one of many ways."""

    def __init__(self, how: str, when: str) -> None:
        self.how, self.when = how, when

    def _harm(self, when: str, news: Any) -> None:
        if when != self.when:
            return
        match self.how:
            case "raises":
                raise ValueError("harm")
            case "exits":
                sys.exit(3)
            case "interrupts":
                raise KeyboardInterrupt
            case "stops iterating":
                raise StopIteration
            case "is out of memory":
                raise MemoryError
            case "changes the result" if news.result is not None:
                news.result.metrics.clear()
                news.result.history.clear()

    def on_start(self, run: Any) -> None:
        self._harm("on_start", run)

    def on_step(self, step: Any) -> None:
        self._harm("on_step", step)

    def on_evaluation(self, evaluation: Any) -> None:
        self._harm("on_evaluation", evaluation)

    def on_event(self, event: Any) -> None:
        self._harm("on_event", event)

    def on_end(self, end: Any) -> None:
        self._harm("on_end", end)


METHODS = ("on_start", "on_step", "on_evaluation", "on_event", "on_end")


@pytest.mark.parametrize(
    ("how", "when"),
    [
        *(("raises", when) for when in METHODS),
        ("exits", "on_step"),
        ("interrupts", "on_event"),
        ("stops iterating", "on_step"),
        ("is out of memory", "on_end"),
    ],
)
def test_one_that_raises_is_named_and_the_run_goes_on(yard: Yard, how: str, when: str) -> None:
    watches = Watches()
    result = yard.run(Logs(), workers=2, callbacks=[Harms(how, when), watches], **SETTINGS)
    assert_same(result, yard.undisturbed(Logs(), **SETTINGS))
    (said,) = events(result.folder, "callback")
    assert said["note"].startswith(f"Harms.{when}: ")
    assert said["note"].endswith(": it hears no more")
    assert len(watches.of("step")) == 12, "others hear on"


def test_the_result_that_it_gets_is_a_copy(yard: Yard) -> None:
    harms = Harms("changes the result", "on_end")
    result = yard.run(Logs(), workers=2, callbacks=[harms], **SETTINGS)
    assert_same(result, yard.undisturbed(Logs(), **SETTINGS))


class Slow(lockstep.Callback):
    def __init__(self, seconds: float) -> None:
        self.seconds, self.steps = seconds, 0

    def on_step(self, step: Any) -> None:
        self.steps += 1
        time.sleep(self.seconds)


def test_a_slow_one_holds_nothing_up(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks_module, "MOST_WAITING", 5)
    monkeypatch.setattr(callbacks_module, "END_SECONDS", 0.3)
    slow = Slow(0.2)
    settings = {**SETTINGS, "steps": 200}
    result = yard.run(Logs(), workers=2, callbacks=[slow], **settings)
    assert result.wall_seconds < 20, "200 steps at its pace would take 40"
    assert_same(result, yard.undisturbed(Logs(), **settings))
    notes = [event["note"] for event in events(result.folder, "callback")]
    missed = 200 - slow.steps
    assert notes == [
        "Slow did not return within 0.3 s",
        f"Slow was too slow: {missed:,} steps and events were not passed on",
    ]


def test_one_that_never_returns(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks_module, "END_SECONDS", 0.3)
    goes_on = threading.Event()

    class Hangs(lockstep.Callback):
        def on_start(self, run: Any) -> None:
            goes_on.wait()

    watches = Watches()
    result = yard.run(Logs(), workers=2, callbacks=[Hangs(), watches], **SETTINGS)
    goes_on.set()
    (said,) = events(result.folder, "callback")
    assert said["note"] == "Hangs did not return within 0.3 s"
    assert len(watches.of("step")) == 12
    until_gone("lockstep callback Hangs")


def until_gone(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(5)
            assert not thread.is_alive()


def test_runs_that_end_otherwise(yard: Yard) -> None:
    """Stopped, failed, and resumed."""
    watches, folder = Watches(), yard.path()
    poison = Fault(worker_id=-1, step=9, phase="forward", shard=3, repeat=True)
    with pytest.raises(LockstepError):
        yard.run(
            Logs(), workers=2, out=folder, callbacks=[watches], faults=(poison,),
            checkpoint_steps=4, **SETTINGS,
        )  # fmt: skip
    (end,) = watches.of("end")
    assert end.result is None
    assert "shard 3 of step 9 has killed 3 workers" in end.error
    again = Watches()
    result = lockstep.resume(folder, task=Logs(), workers=2, callbacks=[again], quiet=True)
    assert_same(result, yard.undisturbed(Logs(), **SETTINGS))
    assert again.of("start")[0].step == 9
    assert [step.step for step in again.of("step")] == [9, 10, 11]
    assert again.of("end")[0].result == result


def test_one_that_asks_to_stop(yard: Yard) -> None:
    """As anybody may: by the handle of the run."""
    handle: list[lockstep.Run] = []
    started = threading.Event()

    class Stops(lockstep.Callback):
        def on_step(self, step: Any) -> None:
            started.wait()
            handle[0].stop()

    folder = Path(yard.path())
    run = lockstep.start(
        Logs(), out=str(folder), callbacks=[Stops()], quiet=True, workers=2, shards=6, threads=1,
        **{**SETTINGS, "steps": 100_000},
    )  # fmt: skip
    handle.append(run)
    started.set()
    with pytest.raises(StoppedError):
        run.result(60)


@pytest.mark.parametrize("given", [[print], ["tensorboard!"], [lockstep.Callback]])
def test_what_is_no_callback_is_refused(yard: Yard, given: list[Any]) -> None:
    folder = Path(yard.path())
    with pytest.raises(JobError, match="a callback is none"):
        yard.run(Logs(), out=str(folder), callbacks=given, **SETTINGS)
    assert not folder.exists()


def test_a_thread_ends_with_its_callback() -> None:
    """Without a run: whatever is told after the end is dropped."""
    hears: Callable[[], Watches] = Watches
    watches = hears()
    thread = CallbackThread(watches)
    thread.tell("on_step", 1)
    thread.end()
    assert thread.ended_within(5)
    thread.tell("on_step", 2)
    assert watches.heard == [("step", 1)]
