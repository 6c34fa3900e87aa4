"""Stragglers: what a worker at a quarter of its speed costs, with one shard each and with many.

    python -m benchmarks.stragglers --write docs/stragglers.md

From outside, one of two workers is stopped for three quarters of each 20 ms, so all that it does
takes four times as long. With V = W = 2 a step waits for its one shard; with V = 12 the other takes
over the shards that it has not begun. The bits must be those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lockstep
from benchmarks.harm import live_workers
from benchmarks.models import WORLD
from benchmarks.report import MODELS, publish, table
from benchmarks.tasks import Benchmark

PERIOD, RUNNING = 0.02, 0.25
"""Seconds, and the part of them that the slowed worker runs."""
SHARDS = (2, 12)
MODEL = "transformer"
SAMPLES = 96
"""Per step: with 12 shards, 8 each."""
WAIT_SECONDS = 300.0


def train(shards: int, steps: int, slowed: bool, out: Path) -> lockstep.Result:
    """A run on two workers of one thread; `slowed`: the second runs at a quarter of its speed."""
    settings: dict[str, Any] = {
        "workers": WORLD, "shards": shards, "threads": 1, "evaluate": False, "quiet": True,
    }  # fmt: skip
    running = lockstep.start(
        Benchmark(MODEL), steps=steps, batch_size=SAMPLES, out=str(out), **settings
    )
    try:
        if slowed:
            slow(running, out)
        return running.result(WAIT_SECONDS)
    finally:
        running.stop()


def slow(running: lockstep.Run, out: Path) -> None:
    """Stop and continue a worker in turns until the run ends."""
    limit = time.monotonic() + WAIT_SECONDS
    while running.running and time.monotonic() < limit:
        workers = live_workers(out) if (out / "events.jsonl").exists() else []
        if len(workers) < WORLD:
            time.sleep(PERIOD)
            continue
        with contextlib.suppress(ProcessLookupError):  # it has finished
            while running.running:
                os.kill(workers[-1], signal.SIGSTOP)
                time.sleep(PERIOD * (1 - RUNNING))
                os.kill(workers[-1], signal.SIGCONT)
                time.sleep(PERIOD * RUNNING)
        return


def measure(steps: int, repeats: int, place: Path) -> dict[int, list[float]]:
    """For each number of shards: the rate with a slowed worker as a share of that without."""
    ratios: dict[int, list[float]] = {shards: [] for shards in SHARDS}
    for number in range(repeats):
        for shards in SHARDS:
            plain, slowed = (
                train(shards, steps, each, place / f"{shards}-{number}-{each}")
                for each in (False, True)
            )
            if plain.fingerprint != slowed.fingerprint or slowed.recoveries:
                raise AssertionError(f"V = {shards}: other bits, or the slowed worker was replaced")
            ratios[shards].append(slowed.samples_per_second / plain.samples_per_second)
            print(f"V = {shards}: {ratios[shards][-1]:.3f}", file=sys.stderr, flush=True)
    return ratios


def page(ratios: dict[int, list[float]]) -> str:
    """The figures in Markdown."""
    rows = [
        [
            f"{shards}",
            f"{statistics.median(found):.2f}",
            f"{min(found):.2f} to {max(found):.2f}",
            f"{len(found)}",
        ]
        for shards, found in ratios.items()
    ]
    return f"""<!-- Written by benchmarks/stragglers.py; do not edit. -->
# What a slow worker costs

Samples per second with one of two workers at a quarter of its speed, as a share of those of an
undisturbed run: {MODELS[MODEL]}, {SAMPLES} samples a step. Waiting for the slow one would
leave 0.25; sharing the work as it can be shared, (1 + 0.25) / 2 = 0.63. Each pair of runs ended in
the same fingerprint, and nobody was replaced. To measure again, on a machine that does nothing
else: `python -m benchmarks.stragglers --write docs/stragglers.md`.

{table(["shards", "with / without", "least to greatest", "pairs"], rows)}
"""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lockstep-stragglers-") as folder:
        text = page(measure(options.steps, options.repeats, Path(folder)))
    publish(text, options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
