"""State outside the model: made right, or refused before it can change a bit."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, TensorDataset, default_collate

import lockstep
from lockstep.errors import TaskError
from lockstep.job.faults import Fault

SAMPLES, FEATURES, CLASSES = 48, 4, 2
X = torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


class Plain(lockstep.Task):
    """Tell two kinds of points apart; remembers nothing."""

    def model(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(FEATURES, 3), nn.Tanh(), nn.Linear(3, CLASSES))

    def train_data(self) -> Any:
        return TensorDataset(X, Y)

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, params: lockstep.Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)


class Frozen(Plain):
    """The first layer is frozen, and unfrozen at step 4: it is in no optimizer then."""

    def set_position(self, position: lockstep.Position) -> None:
        self.step = position.step

    def model(self) -> nn.Sequential:
        self.whole = super().model()
        self.whole[0].requires_grad_(False)
        return self.whole

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        if self.step == 4:
            model[0].requires_grad_(True)
        return super().loss(model, batch)


class FrozenInTheOptimizer(Frozen):
    """The same, with an optimizer that has all parameters from the start."""

    def optimizer(self, params: lockstep.Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.whole.parameters(), lr=0.1)


class FrozenFor(Frozen):
    """As the message advises: trainable from the start, frozen by the position alone."""

    def model(self) -> nn.Sequential:
        return Plain.model(self)

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        model[0].requires_grad_(self.step >= 4)
        return Plain.loss(self, model, batch)


class Numbered(Plain):
    """Words are numbered as a set of texts is iterated: by their hashes."""

    def train_data(self) -> Any:
        words = [f"word {i}" for i in range(SAMPLES)]
        numbers = {word: i for i, word in enumerate(set(words))}
        order = [numbers[word] for word in words]
        return TensorDataset(X[order], Y)


class Noise:
    """A transform that owns a generator."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.draw = functools.partial(generator.normal, 0.0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.draw(scale=0.1)


class Augmented(Dataset[Any]):
    """Noise from generators of every kind, seeded or not."""

    def __init__(self) -> None:
        self.transforms = {
            "noise": [Noise(np.random.default_rng()), Noise(np.random.default_rng())]
        }
        self.old, self.torch = np.random.RandomState(1), torch.Generator()
        own = random.Random(2)
        self.scale = lambda: 1 + own.random()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        x = X[index] * self.scale() + self.old.rand() + torch.rand(FEATURES, generator=self.torch)
        for transform in self.transforms["noise"]:
            x = transform(x)
        return x, Y[index]


class Draws(Plain):
    """A task that draws from its own generators, in `collate` and in the loss."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng()

    def train_data(self) -> Any:
        return Augmented()

    def collate(self, samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return x + self.generator.random(), y

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        return super().loss(model, batch) * self.generator.uniform(0.9, 1.1)


class CannotBeSeeded(Plain):
    """Its generator draws from the operating system."""

    def model(self) -> nn.Sequential:
        self.tools = [random.SystemRandom()]
        return super().model()


def fingerprint(task: lockstep.Task, folder: Path, workers: int, **settings: Any) -> str:
    given = {"shards": 3, "threads": 1, "batch_size": 12, "data_epochs": 2, **settings}
    out = folder / f"{type(task).__name__}-{len(list(folder.iterdir()))}"
    return lockstep.run(task, workers=workers, out=out, quiet=True, **given).fingerprint


@pytest.mark.parametrize("kind", [Frozen, FrozenInTheOptimizer])
def test_a_layer_that_is_unfrozen_is_refused(kind: type[Plain], tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"parameter 0\.weight was frozen"):
        fingerprint(kind(), tmp_path, 2)


def test_a_layer_that_is_frozen_by_the_position(tmp_path: Path) -> None:
    found = {fingerprint(FrozenFor(), tmp_path, workers) for workers in (1, 2, 3)}
    assert len(found) == 1
    assert found != {fingerprint(Plain(), tmp_path, 1)}


def test_a_set_of_texts_has_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for seed in ("1", "2", "random"):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        found.add(fingerprint(Numbered(), tmp_path, 2))
    assert len(found) == 1


def test_own_generators_are_seeded(tmp_path: Path) -> None:
    faults = (Fault(kind="exit", worker_id=1, phase="backward", step=2),)
    runs: list[dict[str, Any]] = [
        {"workers": 1},
        {"workers": 2},
        {"workers": 3, "loaders": 1},
        {"workers": 2, "faults": faults},
    ]
    found = [fingerprint(Draws(), tmp_path, **settings) for settings in runs]
    assert len(set(found)) == 1
    assert fingerprint(Draws(), tmp_path, 2, seed=1) not in found


def test_a_generator_that_cannot_be_seeded_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"task\.tools\[0\] is a random number generator"):
        fingerprint(CannotBeSeeded(), tmp_path, 1)
