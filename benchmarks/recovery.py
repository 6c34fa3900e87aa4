"""Recovery: how long a killed or stopped worker delays training, compared with torchrun's restart.

    python -m benchmarks.recovery --kills 100 --write docs/recovery.md

The MNIST CNN trains on two workers; a random worker is killed from outside at random moments. The
time runs from the signal to the next committed step, by one clock: the kernel's monotonic one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lockstep
from benchmarks.harm import live_workers, read_events
from benchmarks.report import publish

SETTINGS: dict[str, Any] = {
    "workers": 2,
    "shards": 4,
    "threads": 1,
    "evaluate": False,
    "quiet": True,
}
SETTLE_SECONDS = (0.3, 0.8)
WAIT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One signal and what came of it, in milliseconds."""

    detection: float
    regrouping: float
    commit: float
    """From the signal to the next committed step."""
    recomputing: float
    """An estimate: the shards that were computed again, at the median time of one."""
    full: float
    """From the signal to two workers at work."""

    @property
    def beyond(self) -> float:
        """What recovery itself costs."""
        return max(0.0, self.commit - self.recomputing)


def measure(signals: int, number: signal.Signals, seed: int, place: Path) -> list[Sample]:
    """Send so many signals to random workers of one long run."""
    rng = random.Random(seed)
    folder = place / f"run-{number.name}"
    task = lockstep.Job(task="mnist", args={"model": "cnn"})
    running = lockstep.start(task, out=str(folder), data_epochs=10_000, **SETTINGS)
    samples: list[Sample] = []
    try:
        wait_for(lambda: any(e["event"] == "first_step" for e in read_events(folder)), running)
        while len(samples) < signals:
            time.sleep(rng.uniform(*SETTLE_SECONDS))
            pids = live_workers(folder)
            if len(pids) < 2:
                continue
            victim = rng.choice(pids)
            at = time.time()
            os.kill(victim, number)
            samples.append(follow(folder, victim, at, running))
    finally:
        running.stop()
        with contextlib.suppress(lockstep.LockstepError):  # stopped, as asked
            running.result(WAIT_SECONDS)
    return samples


def wait_for(ready: Callable[[], bool], running: lockstep.Run) -> None:
    """Poll until `ready()`, for a bounded time."""
    limit = time.monotonic() + WAIT_SECONDS
    while not ready():
        if time.monotonic() > limit or not running.running:
            raise TimeoutError("the run did not get there in time")
        time.sleep(0.005)


def follow(folder: Path, victim: int, at: float, running: lockstep.Run) -> Sample:
    """Wait until the run is back at full strength, and read what happened from its events."""
    from datetime import datetime

    def since(event: dict[str, Any]) -> float:
        return (datetime.fromisoformat(event["time"]).timestamp() - at) * 1e3

    found: dict[str, float] = {}
    recovered: dict[str, Any] = {}

    def ready() -> bool:
        died = False
        for event in read_events(folder):
            if event["event"] == "died" and event["pid"] == victim:
                died = True
                found["died"] = since(event)
            elif died and event["event"] == "recovered" and event["pid"] == victim:
                recovered.update(event)
            elif died and event["event"] == "formed" and len(event["seats"]) == 2:
                found.setdefault("full", since(event))
        return bool(recovered) and "full" in found

    wait_for(ready, running)
    shard = shard_milliseconds(folder)
    return Sample(
        detection=found["died"],
        regrouping=recovered["regroup_ms"],
        commit=found["died"] + recovered["recovery_ms"],
        recomputing=shard * recovered["recomputed"],
        full=found["full"],
    )


def shard_milliseconds(folder: Path) -> float:
    """A shard of 16 images takes about so long on this machine; measured by `calibrate`."""
    del folder
    return CALIBRATED[0]


CALIBRATED = [0.0]


def calibrate(place: Path) -> None:
    """The time of a step divided by a worker's shards, undisturbed."""
    task = lockstep.Job(task="mnist", args={"model": "cnn"})
    result = lockstep.run(task, out=str(place / "calibration"), data_epochs=3, **SETTINGS)
    CALIBRATED[0] = 64 / result.samples_per_second * 1e3 / 2


TORCHRUN = Path(__file__).with_name("torchrun_cnn.py")


def torchrun(repeats: int, seed: int, place: Path) -> list[float]:
    """Milliseconds from SIGKILL of a rank to the next training step, under torchrun."""
    rng = random.Random(seed)
    found = []
    for number in range(repeats):
        log = place / f"torchrun-{number}.jsonl"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node",
            "2", "--max-restarts", "3", "--master-addr", "127.0.0.1", "--master-port",
            str(29700 + number), str(TORCHRUN), str(log), str(place / f"torchrun-{number}.pt"),
        ]  # fmt: skip
        process = subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
        )
        try:
            found.append(kill_and_wait(log, rng, process))
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return found


def steps_of(log: Path) -> list[dict[str, float]]:
    """What the ranks have logged."""
    try:
        lines = log.read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def kill_and_wait(log: Path, rng: random.Random, process: subprocess.Popen[bytes]) -> float:
    """Kill a rank when training is under way; the time until the next step that is logged.

    Infinite if there is none within `WAIT_SECONDS`.
    """
    limit = time.monotonic() + WAIT_SECONDS
    while len(steps_of(log)) < 20 + rng.randrange(20):
        if time.monotonic() > limit or process.poll() is not None:
            raise TimeoutError("torchrun did not train")
        time.sleep(0.02)
    victim = int(steps_of(log)[-1]["pid"])
    at = time.time()
    os.kill(victim, signal.SIGKILL)
    limit = time.monotonic() + WAIT_SECONDS
    while True:
        later = [step for step in steps_of(log) if step["restart"] > 0]
        if later:
            return (later[0]["time"] - at) * 1e3
        if time.monotonic() > limit:
            return math.inf  # it hangs now and then: that is a result
        time.sleep(0.02)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def row(name: str, values: Sequence[float]) -> str:
    """A table row: median, 90th and 99th percentile, most."""
    cells = [statistics.median(values), quantile(values, 0.9), quantile(values, 0.99), max(values)]
    return f"| {name} | " + " | ".join(f"{cell:,.0f}" for cell in cells) + " |"


def bars(kills: list[Sample]) -> list[tuple[str, float, float]]:
    """What was asked for, what was found, and the most that it may be, in milliseconds."""
    beyond = [sample.beyond for sample in kills]
    return [
        ("SIGKILL to the next step beyond recomputing, median", statistics.median(beyond), 100.0),
        ("the same, 99 %", quantile(beyond, 0.99), 300.0),
        ("to full strength, 99 %", quantile([sample.full for sample in kills], 0.99), 1000.0),
    ]


def verdict(bar: tuple[str, float, float]) -> str:
    name, found, most = bar
    return f"| {name} under {most:.0f} | {found:.0f} | {'pass' if found < most else 'miss'} |"


def page(kills: list[Sample], stops: list[Sample], restarts: list[float]) -> str:
    """The figures in Markdown."""
    parts = [
        "# Recovery\n",
        "The MNIST CNN on two workers, V = 4; signals from outside at random moments "
        "(`make bench-recovery`).\nMilliseconds from the signal; one shard takes "
        f"{CALIBRATED[0]:.1f} ms.\n",
    ]
    if kills:
        parts += ["| bar | found | |\n|---|---|---|", *map(verdict, bars(kills))]
    for name, samples in (("SIGKILL", kills), ("SIGSTOP", stops)):
        if samples:
            parts += [
                f"\n## {name}, {len(samples)} times\n",
                "| | median | 90 % | 99 % | most |\n|---|---|---|---|---|",
                row("to its detection", [s.detection for s in samples]),
                row("from there to a new membership", [s.regrouping for s in samples]),
                row("to the next committed step", [s.commit for s in samples]),
                row("... without recomputing shards", [s.beyond for s in samples]),
                row("to full strength", [s.full for s in samples]),
            ]
    if restarts:
        parts += [
            f"\n## torchrun --max-restarts, DDP on gloo, {len(restarts)} times\n",
            "| | median | 90 % | 99 % | most |\n|---|---|---|---|---|",
            row("to the next step, from the last checkpoint", restarts),
            f"\n`inf`: no step within {WAIT_SECONDS:.0f} s.",
        ]
    return "\n".join(parts) + "\n"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lockstep-recovery-") as name:
        place = Path(name)
        calibrate(place)
        kills = measure(options.kills, signal.SIGKILL, options.seed, place)
        stops = measure(options.stops, signal.SIGSTOP, options.seed, place) if options.stops else []
        restarts = torchrun(options.restarts, options.seed, place)
    text = page(kills, stops, restarts)
    publish(text, options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
