"""Records: what the snapshot and the ledger cost, against the same run without them.

    python -m benchmarks.records --repeats 5 --write docs/records.md

Without them no snapshot is taken, no step's digests are taken, and no line is written;
all else is as ever. Both run the same steps, in turns, and the order turns from pair to pair.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import lockstep
from benchmarks.models import CASES, WORLD
from benchmarks.report import MODELS, publish, table
from benchmarks.tasks import Benchmark
from lockstep.agent import worker_group as worker_group
from lockstep.planning.digest_sample import DigestSample
from lockstep.results.ledger import Ledger

if TYPE_CHECKING:
    from torch import nn

BAR = 0.97
"""The rate with records has to be this share of the rate without."""
NEVER = 1 << 40


class Unrecorded(Benchmark):
    """Takes the digests out of the workers: they are forks of the process that builds the model."""

    def model(self) -> nn.Module:
        DigestSample.units = lambda self, step: ()  # type: ignore[method-assign]
        return super().model()


def _never(*_: object) -> int:
    return NEVER


def _nothing(*_: object) -> tuple[()]:
    return ()


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Takes the snapshot and the ledger out of the master."""
    with (
        # Plain functions: mocks keep their calls, which costs more than what is taken away.
        mock.patch.object(worker_group, "steps_between", _never),
        mock.patch.object(DigestSample, "units", _nothing),
        mock.patch.object(Ledger, "commit", _nothing),
    ):
        yield


def rate(task: Benchmark, steps: int, out: Path) -> float:
    """Samples per second of a run on two workers of one thread."""
    settings: dict[str, Any] = {
        "workers": WORLD, "shards": WORLD, "threads": 1, "evaluate": False, "quiet": True,
        "batch_size": CASES[task.name].batch * WORLD,
    }  # fmt: skip
    return lockstep.run(task, steps=steps, out=str(out), **settings).samples_per_second


def measure(name: str, seconds: float, repeats: int, place: Path) -> list[float]:
    """Ratios of pairs of runs of about so many seconds."""
    trial = rate(Benchmark(name), 50, place / "trial")
    steps = max(50, int(trial * seconds / (CASES[name].batch * WORLD)))
    ratios = []
    for number in range(repeats):
        rates: dict[bool, float] = {}
        for recorded in (True, False) if number % 2 else (False, True):
            out = place / f"{number}-{recorded}"
            if recorded:
                rates[recorded] = rate(Benchmark(name), steps, out)
                continue
            with unrecorded():
                rates[recorded] = rate(Unrecorded(name), steps, out)
        ratios.append(rates[True] / rates[False])
    return ratios


def row(name: str, ratios: list[float]) -> list[str]:
    middle = statistics.median(ratios)
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    verdict = "pass" if middle >= BAR else "miss"
    return [name, f"{middle:.3f}", spread, str(len(ratios)), f"{BAR}", verdict]


def page(rows: list[list[str]]) -> str:
    """The figures in Markdown."""
    head = ["model", "with / without", "least to greatest", "pairs", "bar", "verdict"]
    return f"""<!-- Written by benchmarks/records.py; do not edit. -->
# What the snapshot and the ledger cost

Samples per second with the snapshot, the digests and the ledger, as a share of those
without: the same steps, run in turns, on two workers of one thread. To measure again, on a machine
that does nothing else: `python -m benchmarks.records --write docs/records.md`.

{table(head, rows)}
"""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seconds", type=float, default=2.0, help="of a run")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="lockstep-records-") as folder:
        for name in options.models:
            found = measure(name, options.seconds, options.repeats, Path(folder, name))
            rows.append(row(name, found))
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    text = page(rows)
    publish(text, options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
