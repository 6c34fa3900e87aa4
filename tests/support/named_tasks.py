"""Tasks that tests name on the command line: one that is sound, and others that are not.

Imports torch and lockstep alone, so that its text can be run as a script or in a notebook.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lockstep

SAMPLES, HELD_OUT, BATCH, FEATURES, CLASSES = 100, 30, 16, 8, 3


class Blobs(lockstep.Task):
    """Tell clouds of points apart, by a model with dropout and batch statistics."""

    def __init__(self, lr: float = 0.1) -> None:
        self.lr = lr

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(16, CLASSES),
        )

    def train_data(self) -> Dataset[Any]:
        return blobs(SAMPLES, seed=1)

    def eval_data(self) -> Dataset[Any] | None:
        return blobs(HELD_OUT, seed=2)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, params: lockstep.Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr, momentum=0.9)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        scores = model(batch[0])
        return {
            "loss": functional.cross_entropy(scores, batch[1], reduction="none"),
            "accuracy": scores.argmax(1) == batch[1],
        }


class Predicts(Blobs):
    """Predicts a class; a record may say when to do harm, and a mark says that it was done."""

    def __init__(self, mark: str = "", number: int = signal.SIGKILL) -> None:
        super().__init__()
        self.mark, self.number = mark, number

    def from_record(self, record: Mapping[str, Any]) -> torch.Tensor:
        return torch.tensor(record["point"])

    def predict(self, model: nn.Module, batch: torch.Tensor) -> list[dict[str, Any]]:
        if self.mark and not Path(self.mark).exists() and float(batch[0, 0]) == 99.0:
            Path(self.mark).touch()
            os.kill(os.getpid(), self.number)
        scores = model(batch)
        drawn = torch.rand(len(batch)).tolist()
        return [
            {"class": label, "scores": row, "drawn": value}
            for label, row, value in zip(
                scores.argmax(1).tolist(), scores.tolist(), drawn, strict=True
            )
        ]


class Fails(Predicts):
    """Cannot do what comes after record 150."""

    def from_record(self, record: Mapping[str, Any]) -> torch.Tensor:
        if record["id"] == "é150":
            raise ValueError("not this one")
        return super().from_record(record)


def blobs(count: int, seed: int) -> TensorDataset:
    """Points `[count, FEATURES]` around one centre per class, and their classes `[count]`."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    return TensorDataset(
        centres[labels] + torch.randn(count, FEATURES, generator=generator), labels
    )


def small_blobs(lr: float = 0.1) -> lockstep.Job:
    """A recipe: a function that returns a job."""
    return lockstep.Job(task=Blobs(lr), batch_size=BATCH, steps=9, shards=2, threads=1)


# Methods that are missing or return something unusable.


class NoLoss(Blobs):
    loss = lockstep.Task.loss


class NothingButAModel(lockstep.Task):
    def model(self) -> nn.Module:
        raise AssertionError("nothing may be built before the task is known to be whole")


class LossPerSample(Blobs):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


class LossWithoutGraph(Blobs):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return super().loss(model, batch).detach()


class ComplexLoss(Blobs):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return super().loss(model, batch) + 0j


class HidesAMethod(Blobs):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss()  # type: ignore[method-assign]


class StepsByTheBatch(Blobs):
    scheduler_interval = "batch"  # type: ignore[assignment]


class PenaltyWithoutMetrics(Blobs):
    """Its loss needs gradients, and is what held-out data go through."""

    def metrics(self, model: nn.Module, batch: Any) -> Any:
        return lockstep.Task.metrics(self, model, batch)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        points = batch[0].clone().requires_grad_()
        slopes = torch.autograd.grad(model(points).sum(), points, create_graph=True)
        return torch.cat(slopes).square().mean()


class MetricsOfNoNames(Blobs):
    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return torch.zeros(3)  # type: ignore[return-value]


class MetricsOfWords(Blobs):
    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"verdict": "good"}


class MetricsThatAreNotFinite(Blobs):
    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"nan": float("nan"), "inf": float("inf")}


class MetricsOfAnotherShape(Blobs):
    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"scores": model(batch[0])}


class MetricsOfOtherNames(Blobs):
    """The last held-out batch is short: its metrics have another name."""

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"accuracy" if len(batch[0]) == BATCH else "accuracy_of_rest": 1.0}


# Data.


class NoSamples(Blobs):
    def train_data(self) -> Dataset[Any]:
        return blobs(0, seed=1)


class Stream(Blobs):
    def train_data(self) -> Dataset[Any]:
        class Endless(IterableDataset[torch.Tensor]):
            def __iter__(self) -> Iterator[torch.Tensor]:
                while True:
                    yield torch.zeros(FEATURES)

        return Endless()


class StreamOfKnownLength(Blobs):
    def train_data(self) -> Dataset[Any]:
        class Numbers(IterableDataset[int]):
            def __len__(self) -> int:
                return SAMPLES

            def __iter__(self) -> Iterator[int]:
                return iter(range(SAMPLES))

        return Numbers()


class Batches(Blobs):
    def train_data(self) -> Dataset[Any]:
        return DataLoader(blobs(SAMPLES, seed=1))  # type: ignore[return-value]


class Poisoned(Blobs):
    """One sample is not a number, so the loss of the first step that has it is not either."""

    sample = 77

    def train_data(self) -> Dataset[Any]:
        data = blobs(SAMPLES, seed=1)
        data.tensors[0][self.sample] = float("nan")
        return data


# Models and optimizers.


class Large(Blobs):
    """An embedding that costs no memory before it is trained: the pages are never touched."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def model(self) -> nn.Module:
        return nn.Embedding(self.rows, 64, _weight=torch.zeros(self.rows, 64))


class Lookup(nn.Module):
    """A table that does not say that its gradient will be sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(CLASSES, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.embedding(x, self.weight, sparse=True)


class SparseGradients(Blobs):
    def model(self) -> nn.Module:
        return nn.Sequential(Lookup())

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[1]), batch[1])

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"accuracy": model(batch[1]).argmax(1) == batch[1]}


class WantsAClosure(Blobs):
    def optimizer(self, params: lockstep.Parameters) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(params)


class ForeignTensor(Blobs):
    def optimizer(self, params: lockstep.Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD([*params, nn.Parameter(torch.zeros(3, 5))], lr=self.lr)


# Code that fails, leaves or talks.


class RaisesEverywhere(Blobs):
    """All of three workers raise at the same time."""

    def model(self) -> nn.Module:
        self.all_here = multiprocessing.get_context("fork").Barrier(3)
        return super().model()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.all_here.wait(60)
        return look_up(batch)


def look_up(batch: Any) -> torch.Tensor:
    table: dict[str, torch.Tensor] = {}
    return table["no such key"]


class DiesWhileLoading(Blobs):
    def model(self) -> nn.Module:
        os._exit(7)


class AsksForThreads(Blobs):
    """Computes on two threads before any worker is forked."""

    def model(self) -> nn.Module:
        torch.set_num_threads(2)
        torch.randn(512, 512) @ torch.randn(512, 512)
        return super().model()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        torch.exp(torch.zeros(1 << 20))  # on several threads
        return super().loss(model, batch)


class LeavesInTheLoss(Blobs):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        raise SystemExit("enough")


class LeavesWhileLoading(Blobs):
    def model(self) -> nn.Module:
        raise SystemExit("I would rather not")


class Talks(Blobs):
    """Prints from everywhere, by every means."""

    def model(self) -> nn.Module:
        print("building the model")
        subprocess.run(["echo", "from a child"], check=True)
        return super().model()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        print("computing a loss")
        os.write(1, b"from below Python\n")
        return super().loss(model, batch)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        print("measuring")
        return super().metrics(model, batch)
