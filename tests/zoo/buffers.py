"""Convolutions, and what models keep in buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from tests.zoo.vectors import CLASSES, FEATURES, By, Vectors


class Images(By):
    """Convolutions with BatchNorm."""

    inputs = (3, 8, 8)

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
        )  # fmt: skip


class ChannelsLast(Images):
    def model(self) -> nn.Module:
        model = super().model()
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        images = batch[0].to(memory_format=torch.channels_last)
        return super().loss(model, [images, batch[1]])


class Counted(nn.Module):
    """Buffers of all sorts: not persistent, whole numbers, constant, infinite, of odd types."""

    seen: torch.Tensor
    asked: torch.Tensor
    classes_seen: torch.Tensor
    largest: torch.Tensor
    mask: torch.Tensor
    mean: torch.Tensor
    buffer_rules: ClassVar = {
        "seen": "max", "classes_seen": "max", "largest": "mean", "mean": "mean",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.drop = nn.Dropout(0.2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("asked", torch.zeros(()))
        self.register_buffer("table", torch.tensor([1, 2], dtype=torch.uint16))
        self.register_buffer("nothing", None)
        self.register_buffer("classes_seen", torch.zeros(CLASSES, dtype=torch.bool))
        self.register_buffer("largest", torch.full((FEATURES,), -torch.inf))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.1] * 4), persistent=False)
        self.register_buffer("mean", torch.zeros(FEATURES, dtype=torch.float64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(self.drop(x) * torch.exp(self.mask) - self.mean.float())
        if not self.training:
            self.asked += 1
            out = out * self.asked
        else:
            self.seen += len(x)
            self.classes_seen[out.argmax(1)] = True
            self.largest.copy_(torch.maximum(self.largest, x.amax(0)))
            self.mean.lerp_(x.double().mean(0), 0.1)
        return out


class Buffers(Vectors):
    """Also leaves modules in another mode than it found them in."""

    def model(self) -> nn.Module:
        return Counted()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        loss = super().loss(model, batch)
        model.get_submodule("drop").eval()
        return loss

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | float]:
        metrics = super().metrics(model, batch)
        model.train()
        return metrics


class Viewed(nn.Module):
    """Buffers that share their memory: one twice, and one that is a part of another."""

    both: torch.Tensor
    again: torch.Tensor
    part: torch.Tensor
    buffer_rules: ClassVar = {"*": "mean"}

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        both = torch.zeros(2 * FEATURES)
        self.register_buffer("both", both)
        self.register_buffer("again", both)
        self.register_buffer("part", both[FEATURES:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.both.lerp_(x.mean(0).repeat(2), 0.1)
        out: torch.Tensor = self.layer(x - self.part + self.again[FEATURES:].sin())
        return out


class ViewedBuffers(Vectors):
    def model(self) -> nn.Module:
        return Viewed()


class Rebinding(nn.Module):
    """A running mean that is a new tensor after each forward, as much code has it."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("mean", torch.zeros(FEATURES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x - self.mean)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return out


class ReboundBuffer(Vectors):
    def model(self) -> nn.Module:
        return Rebinding()

    def buffer_rules(self) -> Mapping[str, str]:
        return {"me*": "mean"}


class Parametrized(By):
    """Weight norm, and spectral norm with its power iteration in buffers."""

    def model(self) -> nn.Module:
        first = nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, 16))
        last = nn.utils.parametrizations.spectral_norm(nn.Linear(16, CLASSES))
        return nn.Sequential(first, nn.Tanh(), last)
