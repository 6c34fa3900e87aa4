"""Checkpoints: what one a second costs the step loop, against the same run without any.

    python -m benchmarks.checkpoints --repeats 5 --write docs/checkpoints.md

Both run the same number of steps, in turns, and the order turns from one pair to the next. The time
is that from the first committed step to the last, so what is compared is all that a checkpoint
costs: coming to rest, copying the state, going on, and the writer that takes a core meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import lockstep
from benchmarks.harm import read_events
from benchmarks.models import CASES, WORLD
from benchmarks.report import publish
from benchmarks.tasks import Benchmark

NEVER = 1e9
BAR = 0.98
"""The rate with checkpoints has to be this share of the rate without."""


def train(name: str, steps: int, every: float | None, out: Path) -> float:
    """Seconds from the first committed step of a run to the last."""
    settings: dict[str, Any] = {
        "workers": WORLD, "shards": WORLD, "threads": 1, "evaluate": False, "quiet": True,
        "batch_size": CASES[name].batch * WORLD, "checkpoint_seconds": every or NEVER,
    }  # fmt: skip
    lockstep.run(Benchmark(name), steps=steps, out=str(out), **settings)
    events = read_events(out)
    (first,) = [event for event in events if event["event"] == "first_step"]
    last = [event for event in events if event["event"] == "checkpoint"][-1]
    return moment(last) - float(last["seconds"]) - moment(first)


def moment(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def written(out: Path) -> int:
    """How many checkpoints a run has written, but for the last, which each run has."""
    return len([event for event in read_events(out) if event["event"] == "checkpoint"]) - 1


def measure(name: str, seconds: float, repeats: int, place: Path) -> dict[str, Any]:
    """Pairs of runs of about so many seconds."""
    trial = 200
    rate = trial / train(name, trial, None, place / "trial")
    steps = max(trial, int(rate * seconds))
    ratios, counts = [], []
    for number in range(repeats):
        times: dict[bool, float] = {}
        for each in (True, False) if number % 2 else (False, True):
            out = place / f"{name}-{number}-{each}"
            times[each] = train(name, steps, 1.0 if each else None, out)
            if each:
                counts.append(written(out))
        ratios.append(times[False] / times[True])
    return {"name": name, "steps": steps, "ratios": ratios, "checkpoints": counts}


def row(found: dict[str, Any]) -> str:
    ratios = found["ratios"]
    middle = statistics.median(ratios)
    cells = [
        found["name"], f"{found['steps']:,}", f"{statistics.median(found['checkpoints']):.0f}",
        f"{middle:.3f}", f"{min(ratios):.3f} to {max(ratios):.3f}", str(len(ratios)),
        "pass" if middle >= BAR else "miss",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def page(found: list[dict[str, Any]], command: str) -> str:
    """The figures in Markdown."""
    return "\n".join(
        [
            "<!-- Written by benchmarks/checkpoints.py; do not edit. -->",
            "# What checkpoints cost\n",
            "Samples per second with one checkpoint a second, as a share of those without: the",
            "same steps, run in turns. Two workers of one thread. Bar: 0.98 (a stall of 2 %).",
            f"To measure again, on a machine that does nothing else: `{command}`.\n",
            "| model | steps | checkpoints | ratio | least to greatest | pairs | verdict |",
            "|---|---:|---:|---:|---:|---:|---|",
            *map(row, found),
        ]
    ) + "\n"  # fmt: skip


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn", "transformer"])
    parser.add_argument("--seconds", type=float, default=15.0, help="of a run")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lockstep-checkpoints-") as folder:
        found = []
        for name in options.models:
            found.append(measure(name, options.seconds, options.repeats, Path(folder, name)))
            print(row(found[-1]), file=sys.stderr, flush=True)
    text = page(found, "python -m benchmarks.checkpoints --write docs/checkpoints.md")
    publish(text, options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
