"""What shards cost: the benchmark's models on two workers, cut into 2, 4, 8 and 16 shards.

    python -m benchmarks.shards                         # some five minutes, alone on the machine
    python -m benchmarks.shards --rounds 3 --models mlp

Each round runs every number of shards once, in turn; medians, and ratios to two shards, pair by
pair. This is what the default number of shards was chosen by (docs/decisions/0018).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import lockstep
from benchmarks import models

SHARDS = (2, 4, 8, 16)
MODELS = ("softmax", "mlp", "cnn", "transformer", "embedding")
SECONDS = 4.0
"""About how long each run computes."""


def rate(model: str, shards: int, steps: int, folder: Path) -> float:
    """Samples per second of a run."""
    return lockstep.run(
        "benchmarks.tasks:Benchmark", args={"name": model}, steps=steps, shards=shards, workers=2,
        threads=1, batch_size=models.find(model).batch * models.WORLD, evaluate=False, quiet=True,
        out=str(folder / f"{model}-{shards}-{len(list(folder.iterdir()))}"),
    ).samples_per_second  # fmt: skip


def measure(model: str, rounds: int, folder: Path) -> dict[int, tuple[float, float]]:
    """By number of shards: the median rate, and the median ratio to two shards."""
    batch = models.find(model).batch * models.WORLD
    steps = max(30, int(rate(model, 2, 50, folder) * SECONDS / batch))
    rates: dict[int, list[float]] = {shards: [] for shards in SHARDS}
    for _ in range(rounds):
        for shards in SHARDS:
            rates[shards].append(rate(model, shards, steps, folder))
    ratios = {
        shards: [rate / two for rate, two in zip(rates[shards], rates[2], strict=True)]
        for shards in SHARDS
    }
    return {
        shards: (statistics.median(rates[shards]), statistics.median(ratios[shards]))
        for shards in SHARDS
    }


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default=",".join(MODELS))
    options = parser.parse_args()
    print(
        "| model | batch | V = 2, samples/s | V = 4 | V = 8 | V = 16 |\n|---|---|---|---|---|---|"
    )
    with lockstep.preloaded(), tempfile.TemporaryDirectory() as folder:
        for model in options.models.split(","):
            found = measure(model, options.rounds, Path(folder))
            ratios = " | ".join(f"{found[shards][1]:.2f}" for shards in SHARDS[1:])
            batch = models.find(model).batch * models.WORLD
            print(f"| {model} | {batch} | {found[2][0]:,.0f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
