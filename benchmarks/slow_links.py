"""What sending less does to the accuracy: the same samples, with each way of doing so.

    python -m benchmarks.slow_links
    python -m benchmarks.slow_links --samples 4096 --ways plain,topk

A transformer of 10 million parameters, the one that benchmarks.hosts measures on a slow link but
for what it reads, learns clothes (Fashion-MNIST): the 28 rows of an image are seven tokens of four.
One host, since the bits do not depend on hosts. Takes some minutes of processor time a run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import lockstep
from benchmarks.models import LARGE_WIDTH, WORLD
from benchmarks.report import table
from lockstep.datasets import load_fashion_mnist
from lockstep.job import Parameters, Task

BATCH = 16 * WORLD
"""Samples to an update, as in benchmarks.hosts."""
SAMPLES = 24_576
"""24 rounds of 32 local steps."""
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"compression": "bf16"},
    "int8": {"compression": "int8"},
    "topk": {"compression": "topk"},
    "8 local steps": {"local_steps": 8},
    "32 local steps": {"local_steps": 32},
}
"""Settings of the job. The first is what the others are compared with."""
TOKENS, VALUES, CLASSES = 7, 112, 10
RATE = 3e-4


class RowReader(nn.Module):
    """Two encoder layers over the tokens of an image; classes from their mean."""

    def __init__(self) -> None:
        super().__init__()
        width = LARGE_WIDTH
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
    """Classify clothes, at a constant rate."""

    def model(self) -> nn.Module:
        """A fresh model."""
        return RowReader()

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
        return torch.optim.AdamW(params, lr=RATE, fused=True)

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


def train(way: str, samples: int, out: Path) -> lockstep.Result:
    """Learn from so many samples."""
    settings = WAYS[way]
    return lockstep.run(
        Clothes(), steps=samples // (BATCH * settings.get("local_steps", 1)), batch_size=BATCH,
        eval_batch_size=500, workers=WORLD, shards=WORLD, threads=1, seed=0, quiet=True,
        out=str(out), **settings,
    )  # fmt: skip


def row(result: lockstep.Result, way: str, plain: float) -> list[str]:
    """A line of the table; `plain` is the accuracy of the first one."""
    accuracy = result.metrics["accuracy"]
    return [
        way, f"{result.steps:,}", f"{accuracy:.4f}",
        f"{100 * (accuracy - plain):+.2f}", f"{result.metrics['loss']:.4f}", result.fingerprint,
    ]  # fmt: skip


def main() -> int:
    """Train in each way, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--ways", default=",".join(WAYS))
    options = parser.parse_args()
    rows: list[list[str]] = []
    plain = None
    for way in options.ways.split(","):
        with tempfile.TemporaryDirectory(prefix="lockstep-bench-") as folder:
            result = train(way, options.samples, Path(folder, "run"))
        plain = result.metrics["accuracy"] if plain is None else plain
        rows.append(row(result, way, plain))
        print(f"{way}: {result.metrics}", file=sys.stderr, flush=True)
    head = ("way", "exchanges", "accuracy", "points", "loss", "fingerprint")
    print(table(head, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
