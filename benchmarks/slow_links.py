"""Slow links: how local steps and compression change the accuracy, on the same samples.

    python -m benchmarks.slow_links
    python -m benchmarks.slow_links --width 256 --seeds 0,1,2 --ways "plain;8 local steps and int8"

A transformer of 10 million parameters, the one that benchmarks.hosts measures on a slow link but
for what it reads, learns clothes (Fashion-MNIST) at a rate that falls to 0: the 28 rows of an image
are seven tokens of four. One host, since the bits do not depend on hosts. Takes eight minutes of
processor time a run at the full width.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import TensorDataset

import lockstep
from benchmarks.models import LARGE_WIDTH, WORLD
from benchmarks.report import table
from lockstep.job.task import Parameters, Task
from lockstep.recipes.datasets import load_fashion_mnist

BATCH = 16 * WORLD
"""Samples to an update, as in benchmarks.hosts."""
SAMPLES = 61_440
"""60 rounds of 32 local steps; a little more than a data epoch."""
TOKENS, VALUES, CLASSES = 7, 112, 10
RATE = 3e-4

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"compression": "bf16"},
    "int8": {"compression": "int8"},
    "topk": {"compression": "topk"},
    "8 local steps": {"local_steps": 8},
    "8 local steps and int8": {"local_steps": 8, "compression": "int8"},
    "32 local steps": {"local_steps": 32},
}
"""Settings of the job. The first is what the others are compared with."""


class RowReader(nn.Module):
    """Two encoder layers over the tokens of an image; classes from their mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.embed = nn.Linear(VALUES, width)
        self.places = nn.Parameter(0.02 * torch.randn(TOKENS, width))
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(width, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `[n, 10]` of images `[n, 1, 28, 28]`, uint8."""
        tokens = images.view(-1, TOKENS, VALUES).float().div(127.5).sub(1)
        logits: torch.Tensor = self.out(self.encoder(self.embed(tokens) + self.places).mean(1))
        return logits


class Clothes(Task):
    """Classify clothes, in so many updates, at a rate that falls to 0 like a cosine."""

    def __init__(self, width: int, rate: float, updates: int) -> None:
        self.width, self.rate, self.updates = width, rate, updates

    def model(self) -> nn.Module:
        """A fresh model."""
        return RowReader(self.width)

    def train_data(self) -> TensorDataset:
        """60,000 images and their labels."""
        images = load_fashion_mnist()
        return _tensors(images.train_images, images.train_labels)

    def eval_data(self) -> TensorDataset:
        """10,000 others."""
        images = load_fashion_mnist()
        return _tensors(images.test_images, images.test_labels)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Mean cross-entropy."""
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(params, lr=self.rate, fused=True)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """By the update."""
        return CosineAnnealingLR(optimizer, self.updates)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | float]:
        """Per image, `[n]`: the cross-entropy, and whether the likeliest class is the right one."""
        images, labels = batch
        logits = model(images)
        return {
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "accuracy": logits.argmax(dim=1) == labels,
        }


def _tensors(images: Any, labels: Any) -> TensorDataset:
    return TensorDataset(torch.tensor(images), torch.from_numpy(labels))


def train(way: str, width: int, samples: int, rate: float, seed: int, out: Path) -> lockstep.Result:
    """Learn from so many samples."""
    settings = WAYS[way]
    local_steps = settings.get("local_steps", 1)
    steps = samples // (BATCH * local_steps)
    return lockstep.run(
        Clothes(width, rate, steps * local_steps), steps=steps, batch_size=BATCH,
        eval_batch_size=500, workers=WORLD, shards=WORLD, threads=1, seed=seed, quiet=True,
        out=str(out), **settings,
    )  # fmt: skip


def row(name: str, results: Sequence[lockstep.Result], plain: Sequence[float]) -> list[str]:
    """A line of the table, over all seeds; `plain` are the accuracies of the first way."""
    found = [result.metrics["accuracy"] for result in results]
    points = [100 * (mine - theirs) for mine, theirs in zip(found, plain, strict=True)]
    spread = f"{min(points):+.2f} to {max(points):+.2f}"
    loss = statistics.mean(result.metrics["loss"] for result in results)
    mean = statistics.mean(points)
    return [
        name, f"{results[0].steps:,}", f"{statistics.mean(found):.4f}", f"{mean:+.2f}", spread,
        f"{loss:.4f}",
    ]  # fmt: skip


def main() -> int:
    """Train in each way, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--width", type=int, default=LARGE_WIDTH)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--seeds", default="0", help="by commas")
    parser.add_argument("--ways", default=";".join(WAYS), help="by semicolons")
    options = parser.parse_args()
    rows: list[list[str]] = []
    plain: list[float] = []
    for name in options.ways.split(";"):
        results = []
        for seed in map(int, options.seeds.split(",")):
            with tempfile.TemporaryDirectory(prefix="lockstep-bench-") as folder:
                out = Path(folder, "run")
                results.append(train(name, options.width, options.samples, options.rate, seed, out))
            print(f"{name}, seed {seed}: {results[-1].metrics}, {results[-1].fingerprint}",
                  file=sys.stderr, flush=True)  # fmt: skip
        plain = plain or [result.metrics["accuracy"] for result in results]
        rows.append(row(name, results, plain))
    head = ("way", "exchanges", "accuracy", "points", "least to greatest", "loss")
    print(table(head, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
