"""Chaos: random scripted faults and kills from outside, each run compared with an undisturbed one.

    python -m benchmarks.chaos --faults 200 --seed 1
    python -m benchmarks.chaos --minutes 10 --write docs/chaos.md

A run draws faults by (seat, step, phase, kind); beside them a thread kills or stops workers at
random moments. Whatever happens, the fingerprint has to be that of the run in which nothing did.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lockstep
from lockstep.faults import PHASES, Fault
from tests.zoo import ZOO

MODELS = ("mlp", "cnn", "transformer", "clip", "wide-adafactor")
KINDS = ("kill", "kill", "kill", "segfault", "exit", "stop")
STEPS, SHARDS = 60, 6
FAULTS_PER_RUN = 8
STALL_SECONDS = 1.0
RUN_SECONDS = 180.0
"""A run that takes longer hangs."""


@dataclass
class Tally:
    """What has happened so far."""

    fired: Counter[tuple[str, str]] = field(default_factory=Counter)
    runs: int = 0
    recoveries: int = 0
    differences: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        return sum(self.fired.values())


def draw_faults(rng: random.Random, seats: int) -> tuple[Fault, ...]:
    """Faults at random places. A stopped or dead worker's seat is taken by its replacement."""
    steps = sorted(rng.sample(range(1, STEPS - 1), FAULTS_PER_RUN))
    phases = [phase for phase in PHASES if phase != "evaluate"]
    return tuple(
        Fault(
            seat=rng.randrange(seats),
            step=step,
            phase=rng.choice(phases),
            kind=rng.choice(KINDS),  # type: ignore[arg-type]  # a choice of literals
        )
        for step in steps
    )


class Killer(threading.Thread):
    """Sends SIGKILL or SIGSTOP to random workers of a run, at random moments, until it ends."""

    def __init__(self, folder: Path, rng: random.Random, kills: int) -> None:
        super().__init__(daemon=True)
        self.folder, self.rng, self.kills = folder, rng, kills
        self.sent: Counter[str] = Counter()
        self.over = threading.Event()

    def run(self) -> None:
        while self.kills and not self.over.wait(self.rng.uniform(0.05, 0.4)):
            pids = live_workers(self.folder)
            if pids:
                name = self.rng.choice(("SIGKILL", "SIGKILL", "SIGSTOP"))
                try:
                    os.kill(self.rng.choice(pids), getattr(signal, name))
                except ProcessLookupError:
                    continue
                self.sent[name] += 1
                self.kills -= 1


def live_workers(folder: Path) -> list[int]:
    """Process ids of the workers that have joined and have not been seen to die."""
    alive: set[int] = set()
    for event in read_events(folder):
        if event["event"] == "joined":
            alive.add(event["pid"])
        elif event["event"] == "died":
            alive.discard(event["pid"])
    return sorted(alive)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events of a run so far."""
    try:
        lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def train(name: str, out: Path, workers: int, faults: tuple[Fault, ...] = ()) -> lockstep.Result:
    """One run of a model; `STEPS` steps."""
    settings = {**ZOO[name].settings(), "steps": STEPS, "evaluate": False}
    return lockstep.run(
        ZOO[name].task,
        workers=workers,
        shards=SHARDS,
        threads=1,
        stall_seconds=STALL_SECONDS,
        faults=faults,
        out=str(out),
        quiet=True,
        **settings,
    )


def disturb(name: str, expected: str, folder: Path, rng: random.Random, tally: Tally) -> None:
    """One disturbed run, and its comparison."""
    workers = rng.randint(2, 4)
    faults = draw_faults(rng, workers)
    killer = Killer(folder, rng, kills=3)
    watchdog = threading.Timer(RUN_SECONDS, hung, [name, faults])
    watchdog.daemon = True
    killer.start()
    watchdog.start()
    try:
        result = train(name, folder, workers, faults)
    except lockstep.LockstepError as error:
        tally.failures.append(f"{name}: {error}; faults {faults}")
        return
    finally:
        watchdog.cancel()
        killer.over.set()
        killer.join()
        tally.runs += 1
    deaths = [event for event in read_events(folder) if event["event"] == "died"]
    scripted = len(deaths) - sum(killer.sent.values())
    for fault in faults[: max(scripted, 0)]:
        tally.fired[fault.phase, fault.kind] += 1
    for sent, count in killer.sent.items():
        tally.fired["anywhere", sent] += count
    tally.recoveries += len(result.recoveries)
    if result.fingerprint != expected:
        tally.differences.append(f"{name}: {workers} workers, {faults}")


def hung(name: str, faults: tuple[Fault, ...]) -> None:
    """End the process: a run that does not end by itself is what must not happen."""
    print(f"HANG: {name} with {faults}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def chaos(
    seed: int, faults: int, seconds: float, models: tuple[str, ...] = MODELS, loud: bool = True
) -> Tally:
    """Disturb runs until so many faults have fired, or so many seconds have passed."""
    rng, tally, begun = random.Random(seed), Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lockstep-chaos-") as place:
        expected = {
            name: train(name, Path(place) / f"{name}-undisturbed", 2).fingerprint for name in models
        }
        while tally.faults < faults and time.monotonic() - begun < seconds:
            name = models[tally.runs % len(models)]
            disturb(name, expected[name], Path(place) / f"run-{tally.runs}", rng, tally)
            if loud:
                print(
                    f"{tally.runs} runs, {tally.faults} faults, {tally.recoveries} recoveries, "
                    f"{len(tally.differences)} differences, {len(tally.failures)} failures",
                    file=sys.stderr,
                    flush=True,
                )
    return tally


def table(tally: Tally, seed: int) -> str:
    """The tally in Markdown."""
    kinds = sorted({kind for _, kind in tally.fired})
    phases = [*PHASES, "anywhere"]
    rows = [
        f"| {phase} | " + " | ".join(str(tally.fired[phase, kind] or "") for kind in kinds) + " |"
        for phase in phases
        if any(tally.fired[phase, kind] for kind in kinds)
    ]
    head = f"| phase | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}"
    lines = "\n".join(rows)
    return (
        "# Chaos\n\nRandom faults by phase and kind, each run compared with the fingerprint of an "
        "undisturbed one\n(`make chaos`; `anywhere` is a signal from outside at a random moment).\n"
        f"\n{head}\n{lines}\n\nSeed {seed}: {tally.runs} runs, {tally.faults} faults, "
        f"{tally.recoveries} recoveries, {len(tally.differences)} differences, "
        f"{len(tally.failures)} failures, no hang.\n"
    )


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    tally = chaos(options.seed, options.faults, options.minutes * 60)
    page = table(tally, options.seed)
    print(page)
    if options.write:
        options.write.write_text(page)
    for problem in (*tally.differences, *tally.failures):
        print(problem, file=sys.stderr)
    return 1 if tally.differences or tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
