"""Recipe `vision`: image classification by a small residual network; default: Fashion-MNIST.

The network is that of He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2016,
made small enough for two cores. `docs/applications.md` reports accuracy and times.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset

from lockstep.errors import DataError
from lockstep.job.job import Job
from lockstep.job.task import Parameters, Task
from lockstep.recipes import at_least, texts
from lockstep.recipes.datasets import load_fashion_mnist
from lockstep.recipes.datasets.images import Images, read_image, read_images
from lockstep.recipes.mnist import nearest_mean

BATCH_SIZE = 128
RATE, WARM_UP = 0.15, 0.2
"""The highest learning rate, and the fraction of the run in which it is reached."""
SHIFT = 2
"""The largest shift of an image, in pixels."""


def vision(
    data: str | None = None, epochs: float = 10, width: int = 24, size: int = 28,
    color: bool = False,
) -> Job:  # fmt: skip
    """Classify images.

    Args:
        data: A folder of images, as `lockstep.recipes.datasets.images.read_images` reads it:
            four IDX files, or `train/CLASS/*` and `test/CLASS/*`. None: Fashion-MNIST.
        epochs: Passes over the data; the learning rate falls to 0 by their end.
        width: Channels of the first stage; the others have two and four times as many.
        size: Image folders: scale images to `size` x `size`.
        color: Image folders: keep colours.
    """
    texts(data=data)
    at_least(1, width=width)
    at_least(8, size=size)
    task = Vision(data, epochs, width, size, color)
    return Job(task=task, batch_size=BATCH_SIZE, eval_batch_size=500, data_epochs=epochs)


class Residual(nn.Module):
    """Residual block, which halves the image where it has more channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.change = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip: nn.Module = nn.Identity()
        if stride > 1:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`[n, inputs, height, width]` to `[n, outputs, height / stride, width / stride]`."""
        return F.relu(self.change(images) + self.skip(images))


class Vision(Task):
    """Task of the recipe `vision`."""

    def __init__(
        self, data: str | None, epochs: float, width: int, size: int = 28, color: bool = False
    ) -> None:
        self.data, self.epochs, self.width = data, epochs, width
        self.size, self.color = size, color

    @functools.cached_property
    def images(self) -> Images:
        """Both splits, read on first use."""
        if self.data is None:
            return load_fashion_mnist()
        return read_images(self.data, size=self.size, color=self.color)

    def model(self) -> nn.Module:
        """A fresh network from float images `[n, channels, height, width]` to `[n, classes]`."""
        images, width = self.images, self.width
        return nn.Sequential(
            nn.Conv2d(images.train_images.shape[1], width, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Residual(width, width),
            Residual(width, 2 * width),
            Residual(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, len(images.classes)),
        )

    def train_data(self) -> TensorDataset:
        """The training images, as bytes."""
        return _dataset(self.images.train_images, self.images.train_labels)

    def eval_data(self) -> TensorDataset:
        """The held-out images, as bytes."""
        return _dataset(self.images.test_images, self.images.test_labels)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Mean cross-entropy of randomly mirrored and shifted images."""
        images, labels = batch
        return F.cross_entropy(model(_scaled(jitter(images) if model.training else images)), labels)

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        """SGD with Nesterov momentum, and weight decay for weights only."""
        groups = [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": 5e-4},
            {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=RATE, momentum=0.9, nesterov=True)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """Linear warm-up, then cosine decay to 0."""
        size = self.planned_batch_size or BATCH_SIZE
        steps = max(1.0, self.epochs * math.ceil(len(self.images.train_labels) / size))

        def factor(step: int) -> float:
            done = min(1.0, step / steps)
            if done < WARM_UP:
                return 0.05 + 0.95 * done / WARM_UP
            return 0.5 + 0.5 * math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))

        return LambdaLR(optimizer, factor)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | float]:
        """Per image, `[n]`: the cross-entropy, and whether the likeliest class is correct."""
        images, labels = batch
        logits = model(_scaled(images))
        return {
            "loss": F.cross_entropy(logits, labels, reduction="none"),
            "accuracy": logits.argmax(dim=1) == labels,
        }

    def baseline(self) -> dict[str, float]:
        """The accuracy of the class whose mean image is nearest."""
        return {"accuracy": nearest_mean(self.train_data(), self.eval_data())}

    def fitted(self) -> str:
        """The names of the classes, and the shape of an image."""
        return json.dumps([self.images.classes, self.images.train_images.shape[1:]])

    def from_record(self, record: Mapping[str, Any]) -> torch.Tensor:
        """An image, from `image`: the path of a file that Pillow reads. uint8, `[channels, height,
        width]`; it is scaled and converted like the training images."""
        channels, _, size = self.images.train_images.shape[1:]
        path = record.get("image")
        if not isinstance(path, str):
            raise DataError(
                "a record is not an image",
                expected='{"image": "path/of/a/file.png"}',
                found=f"the columns {', '.join(record)}" if path is None else f"{path!r:.60}",
            )
        return torch.tensor(read_image(Path(path), size, channels == 3))

    def predict(self, model: nn.Module, images: torch.Tensor) -> list[dict[str, Any]]:
        """For each of the images (uint8, `[n, channels, height, width]`), the likeliest class."""
        best = model(_scaled(images)).softmax(dim=1).max(dim=1)
        return [
            {"class": self.images.classes[label], "probability": probability}
            for probability, label in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def _dataset(images: Any, labels: Any) -> TensorDataset:
    return TensorDataset(torch.tensor(images), torch.from_numpy(labels))


def _scaled(images: torch.Tensor) -> torch.Tensor:
    """Bytes to floats from -1 to 1."""
    return images.float().div_(127.5).sub_(1)


def jitter(images: torch.Tensor) -> torch.Tensor:
    """Mirror half of the images at random, and shift each by up to `SHIFT` pixels.

    Draws from torch's global generator, which is seeded per step and shard.

    Args:
        images: `[n, channels, height, width]`, of any type.
    """
    count, _, height, width = images.shape
    down, right = torch.randint(2 * SHIFT + 1, (2, count, 1))
    mirrored = torch.rand(count, 1) < 0.5
    rows = down + torch.arange(height)
    columns = torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width)) + right
    sample = torch.arange(count)[:, None, None]
    padded = F.pad(images, (SHIFT,) * 4)
    # The indices that are apart put the channels last.
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
