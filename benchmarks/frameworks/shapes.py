"""The models' parameters and data as NumPy arrays: the sizes are those of `benchmarks.models`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SAMPLES = 8192
HEADS, LAYERS, WIDTH, TOKENS, LENGTH = 4, 2, 128, 1000, 64

Arrays = dict[str, Any]
"""float32, by name."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model: its matrices and vectors, and its samples."""

    parameters: Mapping[str, tuple[int, ...]]
    """Shapes; matrices are `inputs x outputs`, convolutions `height x width x in x out`."""
    sample: tuple[int, ...]
    values: int | None
    """Inputs are int32 below this; None: float32."""
    classes: int
    batch: int
    """Samples per step: those of both workers."""

    def start(self) -> Arrays:
        """Parameters, uniform within ±1/√(inputs); norms' scales are 1."""
        generator = np.random.default_rng(0)
        made: Arrays = {}
        for name, shape in self.parameters.items():
            limit = 1 / math.sqrt(math.prod(shape[:-1]) or 1)
            values = generator.uniform(-limit, limit, shape)
            made[name] = np.ones(shape) if name.endswith("scale") else values
        return {name: value.astype(np.float32) for name, value in made.items()}

    def data(self) -> tuple[Any, Any]:
        """Inputs `[SAMPLES, ...]` and labels `[SAMPLES]`, int32."""
        generator = np.random.default_rng(1)
        size = (SAMPLES, *self.sample)
        labels = generator.integers(self.classes, size=SAMPLES, dtype=np.int32)
        if self.values is None:
            return generator.standard_normal(size, dtype=np.float32), labels
        return generator.integers(self.values, size=size, dtype=np.int32), labels


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.w": (inputs, outputs), f"{name}.b": (outputs,)}


def _encoder() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embed": (TOKENS, WIDTH)}
    for layer in range(LAYERS):
        shapes |= _linear(f"{layer}.qkv", WIDTH, 3 * WIDTH)
        shapes |= _linear(f"{layer}.proj", WIDTH, WIDTH)
        shapes |= _linear(f"{layer}.up", WIDTH, 4 * WIDTH)
        shapes |= _linear(f"{layer}.down", 4 * WIDTH, WIDTH)
        for norm in ("first", "second"):
            shapes |= {f"{layer}.{norm}.scale": (WIDTH,), f"{layer}.{norm}.b": (WIDTH,)}
    return shapes | _linear("out", WIDTH, 10)


MODELS: dict[str, Model] = {
    "softmax": Model(
        parameters=_linear("0", 784, 10), sample=(784,), values=None, classes=10, batch=128
    ),
    "mlp": Model(
        parameters=_linear("0", 784, 512) | _linear("1", 512, 512) | _linear("2", 512, 10),
        sample=(784,), values=None, classes=10, batch=128,
    ),
    "cnn": Model(
        parameters={"0.w": (3, 3, 1, 16), "0.b": (16,), "1.w": (3, 3, 16, 32), "1.b": (32,)}
        | _linear("2", 32 * 7 * 7, 128) | _linear("3", 128, 10),
        sample=(28, 28, 1), values=None, classes=10, batch=64,
    ),
    "transformer": Model(
        parameters=_encoder(), sample=(LENGTH,), values=TOKENS, classes=10, batch=32
    ),
    "embedding": Model(
        parameters={"table": (200_000, 32)} | _linear("0", 32 * 8, 64) | _linear("1", 64, 2),
        sample=(8,), values=200_000, classes=2, batch=512,
    ),
}  # fmt: skip
"""`sparse` is left out: neither framework's Adam has a sparse form of the same rule."""


class Order:
    """Slices of a permutation, anew for each pass over the data, as all contenders draw."""

    def __init__(self, batch: int) -> None:
        self._batch, self._start = batch, SAMPLES
        self._generator = np.random.default_rng(2)
        self._order = np.empty(0, np.int32)

    def __call__(self) -> Any:
        """The rows of the next batch, int32 `[batch]`."""
        if self._start + self._batch > SAMPLES:
            self._order = self._generator.permutation(SAMPLES).astype(np.int32)
            self._start = 0
        self._start += self._batch
        return self._order[self._start - self._batch : self._start]
