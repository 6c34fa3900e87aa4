"""Harm for runs: scripted faults, and signals from outside to random processes, from one seed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lockstep
from benchmarks.process import descendants
from lockstep.job.faults import AROUND, PHASES, Fault
from tests.collectives.test_table_sum import Clicks
from tests.zoo import MORE, ZOO

STEPS = 60
KINDS = ("kill", "kill", "kill", "segfault", "exit", "stop", "loop")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP)
FLIPS = 0.7
"""The part of the faults that flip a bit, where everything is audited."""
FAULTS_PER_RUN, SIGNALS_PER_RUN = 8, 6


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A task, its settings, and between how many workers it may have."""

    task: lockstep.Task
    settings: dict[str, Any]
    workers: tuple[int, int] = (2, 4)


def _of_zoo(name: str, workers: tuple[int, int] = (2, 4), **settings: Any) -> Scenario:
    entry = (ZOO | MORE)[name]
    settings = {**entry.settings(), "steps": STEPS, "shards": 6, "evaluate": False, **settings}
    return Scenario(task=entry.task, settings=settings, workers=workers)


SCENARIOS: dict[str, Scenario] = {
    "CNN with BatchNorm, shards claimed": _of_zoo("cnn"),
    "transformer with dropout, a shard each": _of_zoo("transformer", (3, 3), shards=3),
    "clipped norm, audited": _of_zoo("channels-last", audit=0.3),
    "everything audited, bits flipped": _of_zoo("mlp", audit=1.0),
    "schedule, evaluations, checkpoints": _of_zoo("by-epoch", evaluate=True, checkpoint_steps=7),
    "large embedding": Scenario(
        task=Clicks("once"),
        settings={"batch_size": 96, "steps": STEPS, "seed": 3, "shards": 4, "evaluate": False},
        workers=(2, 3),
    ),
    "loader processes, evaluations": _of_zoo("augmented", (1, 2), evaluate=True, loaders=1),
    "one worker": _of_zoo("buffers", (1, 1), clip_grad_norm=0.5),
    "homes of the workers' own": _of_zoo("channels-last", device="cpu-apart"),
}


def draw_faults(rng: random.Random, scenario: Scenario, workers: int) -> tuple[Fault, ...]:
    """Faults at random places. A stopped or dead worker's worker_id passes to its replacement."""
    steps = sorted(rng.sample(range(1, STEPS - 1), FAULTS_PER_RUN))
    phases = [*PHASES, *AROUND]
    if not scenario.settings["evaluate"]:
        phases.remove("evaluate")
    faults = []
    for step in steps:
        flips = scenario.settings.get("audit") == 1.0 and rng.random() < FLIPS
        phase = "slot" if flips else rng.choice(phases)
        if phase in AROUND:  # somebody has to start: its predecessor dies first
            faults.append(Fault(worker_id=-1, step=step, phase="reduce"))
        faults.append(
            Fault(
                worker_id=-1 if phase in (*AROUND, "evaluate") else rng.randrange(workers),
                step=_evaluated(scenario, step) if phase == "evaluate" else step,
                phase=phase,
                kind="flip" if flips else rng.choice(KINDS),  # type: ignore[arg-type]  # literals
            )
        )
    return tuple(faults)


def _evaluated(scenario: Scenario, step: int) -> int:
    """A step at the end of some data epoch, where the validation data is evaluated."""
    per_epoch = 5  # 109 samples in batches of 26
    return max(per_epoch, step // per_epoch * per_epoch)


@dataclass
class Meddler:
    """Disturbs a running job from outside, at random moments."""

    running: lockstep.Run
    folder: Path
    rng: random.Random
    most_workers: int
    done: Counter[tuple[str, str]] = field(default_factory=Counter)
    """What was done to whom, how often."""
    stopped_loaders: list[int] = field(default_factory=list)
    """By process id."""

    def meddle(self) -> None:
        """Go on until the run has ended; requests and short stops do no harm and are not counted
        against `SIGNALS_PER_RUN`."""
        left = SIGNALS_PER_RUN
        while self.running.running:
            time.sleep(self.rng.uniform(0.02, 0.3))
            deed = self.rng.choice((*[self._signal] * 4, self._nap, self._ask))
            if deed is not self._signal or left > 0:
                left -= deed()
        for pid in self.stopped_loaders:
            send(pid, signal.SIGCONT)  # it may not have come as far as to be tied to its worker

    def _signal(self) -> int:
        """Kill or stop one, two or all of the workers or one of their loader processes."""
        number = self.rng.choice(SIGNALS)
        workers = live_workers(self.folder)
        starting = sorted(set(spawned(self.folder)) - set(workers))
        whom, pids = self.rng.choice(
            [
                ("a worker", self._some(workers, 1)),
                ("a worker", self._some(workers, 1)),
                ("two workers", self._some(workers, 2)),
                ("all workers", workers if len(workers) > 1 else []),
                ("a worker that starts", self._some(starting[-1:], 1)),
                ("a loader process", self._some(loaders_of(workers), 1)),
            ]
        )
        sent = [pid for pid in pids if send(pid, number)]
        if sent:
            self.done[whom, number.name] += 1
        if whom == "a loader process" and number == signal.SIGSTOP:
            self.stopped_loaders += sent
        return len(sent)

    def _some(self, pids: Sequence[int], count: int) -> list[int]:
        return self.rng.sample(list(pids), count) if len(pids) >= count else []

    def _nap(self) -> int:
        """Stop a worker for a moment, shorter or longer than the stall timeout."""
        for pid in self._some(live_workers(self.folder), 1):
            if send(pid, signal.SIGSTOP):
                time.sleep(self.rng.choice((0.05, 0.2, 1.05)))
                send(pid, signal.SIGCONT)
                self.done["a worker", "SIGSTOP, then SIGCONT"] += 1
        return 0

    def _ask(self) -> int:
        """Scale, pause, or have a checkpoint written."""
        name = self.rng.choice(("scale", "scale", "pause", "checkpoint"))
        if name == "scale":
            self.running.scale(self.rng.randint(1, self.most_workers))
        elif name == "checkpoint":
            self.running.checkpoint()
        else:
            self.running.pause()
            time.sleep(self.rng.uniform(0, 0.2))
            self.running.unpause()
        self.done["the run", name] += 1
        return 0


def send(pid: int, number: signal.Signals) -> bool:
    """Send a signal; whether the process existed."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of a run so far."""
    try:
        lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def live_workers(folder: Path) -> list[int]:
    """Process ids of the workers that have joined and have not been seen to die."""
    return _alive(folder, "joined")


def spawned(folder: Path) -> list[int]:
    """Process ids of the workers that were started and have not been seen to die."""
    return _alive(folder, "spawned")


def _alive(folder: Path, begins: str) -> list[int]:
    alive: dict[int, None] = {}
    for event in read_events(folder):
        if event["event"] == begins:
            alive[event["pid"]] = None
        elif event["event"] == "died":
            alive.pop(event["pid"], None)
    return list(alive)


def loaders_of(workers: Sequence[int]) -> list[int]:
    """The loader processes of these workers."""
    return [pid for worker in workers for pid in descendants(worker)]


class Watchdog:
    """Calls `bark` when a run takes too long; time in which this process itself was stopped does
    not count. Use it as a context manager."""

    LOOK = 0.5

    def __init__(self, seconds: float, bark: Callable[[], None]) -> None:
        import threading

        self.seconds, self.bark = seconds, bark
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        looks = int(self.seconds / self.LOOK)
        for _ in range(looks):
            if self._over.wait(self.LOOK):
                return
        self.bark()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
