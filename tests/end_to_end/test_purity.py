"""What remembers from shard to shard is refused before the first step, or when it first matters."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

import lockstep
from lockstep.errors import JobError, TaskError
from lockstep.job.job import Job
from lockstep.planning.core_split import Division, Facts
from lockstep.planning.plan import decompose
from lockstep.results.run_folder import RunFolder
from lockstep.worker.pristine import Work
from lockstep.worker.purity_check import histories

SAMPLES, FEATURES = 48, 4
X = torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def of(self, _: int) -> float:
        self.count += 1
        return 0.01 * self.count


class Cache:
    """Draws a number for each sample once."""

    def __init__(self) -> None:
        self.drawn: dict[int, float] = {}

    def of(self, index: int) -> float:
        if index not in self.drawn:
            self.drawn[index] = float(np.random.rand())
        return self.drawn[index]


class Recent:
    """The mean of what was seen so far."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def of(self, index: int) -> float:
        self.seen.append(index)
        return float(np.mean(self.seen))


class Iterated:
    def __init__(self) -> None:
        self.numbers = itertools.count()

    def of(self, _: int) -> float:
        return 0.01 * next(self.numbers)


class ChangedInPlace:
    def __init__(self) -> None:
        self.table = torch.ones(SAMPLES)

    def of(self, index: int) -> float:
        self.table[index] *= 0.9
        return float(self.table[index])


class Owner:
    """Owns a generator: that is right."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng()

    def of(self, _: int) -> float:
        return float(self.generator.random())


class Fresh:
    """Remembers nothing, and draws what nobody seeds."""

    def of(self, _: int) -> float:
        return float(np.random.default_rng().random())


class Late(Counter):
    """Counts, and nothing comes of it in the first calls."""

    def of(self, index: int) -> float:
        return max(0.0, super().of(index) - 0.2)


MEMORIES: dict[Any, str] = {
    Counter: "count",
    Cache: "drawn",
    Recent: "seen",
    Iterated: "numbers",
    ChangedInPlace: "table",
}
PLACES = {"data": "data.memory", "task": "task.memory", "model": "model.memory", "global": "HELD"}
HELD: Any = None


class Points(Dataset[Any]):
    def __init__(self, memory: Any) -> None:
        self.memory = memory

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        extra = 0.0 if self.memory is None else self.memory.of(index)
        return X[index] + extra, Y[index], index


class Plain(lockstep.Task):
    def model(self) -> nn.Module:
        return nn.Linear(FEATURES, 2)

    def train_data(self) -> Any:
        return Points(None)

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, params: lockstep.Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)


class Remembers(Plain):
    """Something that remembers is in one place, and changes the loss."""

    def __init__(self, make: Callable[[], Any], place: str) -> None:
        self.make, self.place = make, place

    def model(self) -> nn.Module:
        global HELD
        model = nn.Linear(FEATURES, 2)
        if self.place == "model":
            model.memory = self.make()
        elif self.place == "task":
            self.memory = self.make()
        elif self.place == "global":
            HELD = self.make()
        return model

    def train_data(self) -> Any:
        return Points(self.make() if self.place == "data" else None)

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        x, y, indices = batch
        if self.place != "data":
            held = {"model": getattr(model, "memory", None), "global": HELD}
            memory = held.get(self.place) or self.memory
            x = x + memory.of(int(indices[0]))
        return cross_entropy(model(x), y)


def train(task: lockstep.Task, folder: Path, **settings: Any) -> lockstep.Result:
    given = {"workers": 2, "shards": 3, "threads": 1, "batch_size": 12, "data_epochs": 2}
    out = folder / f"run-{len(list(folder.iterdir()))}"
    return lockstep.run(task, out=out, quiet=True, **{**given, **settings})


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", MEMORIES)
def test_what_remembers_is_refused_by_name(kind: Any, place: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="something remembers") as raised:
        train(Remembers(kind, place), tmp_path)
    assert f"{PLACES[place]}.{MEMORIES[kind]}" in raised.value.found
    assert not list(tmp_path.iterdir()), "a run folder for a run that has not begun"


class Reports(Remembers):
    """What it remembers changes metrics alone."""

    def __init__(self) -> None:
        super().__init__(Counter, "task")

    def eval_data(self) -> Any:
        return Points(None)

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        self.memory.of(0)
        return cross_entropy(model(batch[0]), batch[1])

    def metrics(self, model: Any, batch: Any) -> dict[str, Any]:
        return {"seen": self.memory.count}


def test_what_remembers_for_metrics_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="something remembers") as raised:
        train(Reports(), tmp_path)
    assert "the metrics of a held-out batch; what has changed" in raised.value.found


@pytest.mark.parametrize("place", PLACES)
def test_what_a_generator_draws_is_right(place: str, tmp_path: Path) -> None:
    results = [train(Remembers(Owner, place), tmp_path, workers=count) for count in (1, 3)]
    assert len({result.fingerprint for result in results}) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_random_numbers_that_nobody_seeds_are_refused(workers: int, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="the very same shard got different results"):
        train(Remembers(Fresh, "data"), tmp_path, workers=workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_takes_many_steps_is_found_while_the_run_goes_on(workers: int, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="something remembers") as raised:
        train(Remembers(Late, "task"), tmp_path, workers=workers, purity=1.0, steps=40)
    assert "task.memory.count" in raised.value.found
    with RunFolder.open(tmp_path / "run-0") as folder:
        assert list(folder.checkpoints.iterdir()), "the steps before were thrown away"


def test_a_check_changes_nothing_and_can_be_left_out(tmp_path: Path) -> None:
    results = [train(Remembers(Owner, "data"), tmp_path, purity=share) for share in (0, 1)]
    assert len({result.fingerprint for result in results}) == 1
    train(Remembers(Counter, "data"), tmp_path, purity=0)
    with pytest.raises(JobError, match="purity"):
        train(Remembers(Owner, "data"), tmp_path, purity=2)


def test_one_history_has_other_shards_and_the_same_samples() -> None:
    job = Job(task="points", batch_size=12, data_epochs=2)
    facts = Facts(train_samples=SAMPLES, eval_samples=0, cores=2)
    plan = decompose(job, facts, Division(workers=1, threads=1, shards=3))
    alone, after = histories(plan)
    assert alone == [Work(step=0, shard=0)]
    assert after == [
        Work(step=0, shard=2),
        Work(step=4, shard=0, samples_of=(0, 0)),
        Work(step=0, shard=0),
    ]


class Distilled(Plain):
    """The teacher is a copy of the model, made when it is first needed: a worker that takes the
    place of a dead one would copy a later model."""

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        if not hasattr(self, "teacher"):
            self.teacher = copy.deepcopy(model)
        found = model(batch[0])
        with torch.no_grad():
            wanted = self.teacher(batch[0])
        loss: torch.Tensor = cross_entropy(found, batch[1]) + (found - wanted).square().mean()
        return loss


def test_what_is_made_of_the_first_parameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="something remembers") as raised:
        train(Distilled(), tmp_path)
    assert "task.teacher" in raised.value.found


class Froze(Plain):
    """A layer is frozen once: only in the processes that were there."""

    def set_position(self, position: lockstep.Position) -> None:
        self.step = position.step

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        if self.step == 5:
            model.bias.requires_grad_(False)
        return super().loss(model, batch)


def test_what_is_frozen_once_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="something remembers") as raised:
        train(Froze(), tmp_path)
    assert "the gradient of bias" in raised.value.found
    assert "model.bias.requires_grad" in raised.value.found
