"""Whatever ends a run, what it has committed last is kept, and what was the cause is named."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset

import lockstep
from lockstep.data.sample_order import SampleOrder
from lockstep.errors import (
    IntegrityError,
    LockstepError,
    NonFiniteError,
    PoisonError,
    RunFolderError,
    TaskError,
)
from lockstep.job.task import Parameters
from lockstep.planning.sampling import Sampling
from lockstep.results.checkpoint import list_checkpoints, open_checkpoint
from lockstep.results.ledger import read_ledger
from tests.support.harmed_runs import events, until
from tests.zoo.vectors import CLASSES, FEATURES, SAMPLES, Vectors

SETTINGS: dict[str, Any] = {
    "threads": 1, "batch_size": 26, "data_epochs": 2, "quiet": True, "evaluate": False
}  # fmt: skip
BAD = 29


class Samples(Dataset[Any]):
    """Samples of which one may be bad."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        features = torch.randn(FEATURES, generator=torch.Generator().manual_seed(index))
        if index == BAD:
            match self.how:
                case "raises":
                    raise OSError("image file is truncated")
                case "has another shape":
                    features = torch.zeros(FEATURES + 1)
                case "is NaN":
                    features = features * float("nan")
                case "ends the process":
                    os._exit(9)
        return features, index % CLASSES, index


class Bad(Vectors):
    def __init__(self, how: str = "") -> None:
        self.how = how

    def train_data(self) -> Dataset[Any]:
        return Samples(self.how)


def step_of_bad() -> int:
    """The first step whose batch has the bad sample."""
    sampling = Sampling(samples=SAMPLES, batch_size=26, shards=1, seed=0)
    order = SampleOrder(sampling)
    steps = range(sampling.steps_per_epoch)
    return next(step for step in steps if BAD in order.indices(step, 0))


def kept(folder: str) -> tuple[int, str]:
    """The step and the fingerprint of a failed run's only checkpoint, which the ledger confirms."""
    (path,) = list_checkpoints(Path(folder, "checkpoints"))
    checkpoint = open_checkpoint(path)
    lines = list(read_ledger(Path(folder, "ledger.jsonl")))
    assert lines[checkpoint.step].hash == checkpoint.manifest["ledger"]
    return checkpoint.step, checkpoint.manifest["fingerprint"]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("raises", TaskError),
        ("has another shape", TaskError),
        ("is NaN", NonFiniteError),
        ("ends the process", PoisonError),
    ],
)
def test_a_bad_sample(
    how: str, kind: type[LockstepError], workers: int, run_folders: Callable[[], str]
) -> None:
    """Its step and itself are named, though it was fetched ahead, and the state before is kept."""
    step, folder = step_of_bad(), run_folders()
    assert step > 0
    settings = {**SETTINGS, "shards": 2}
    with pytest.raises(kind, match=rf"step {step}\b") as caught:
        lockstep.run(Bad(how), workers=workers, out=folder, **settings)
    assert re.search(rf"\b{BAD}\b", str(caught.value))
    assert "lockstep.resume(" in caught.value.fix
    mended = lockstep.run(Bad(), workers=1, out=run_folders(), **settings)
    assert kept(folder)[0] == step
    resumed = lockstep.resume(folder, task=Bad(), quiet=True)
    assert [event["step"] for event in events(folder, "resumed")] == [step]
    assert resumed.fingerprint == mended.fingerprint


class BrokenMetric(Vectors):
    """Its metrics cannot be had from some batches."""

    def __init__(self, *, first: bool) -> None:
        self.first = first

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | float]:
        if self.first or 0 not in batch[-1]:
            raise KeyError("accuracy")
        return super().metrics(model, batch)


EVALUATED: dict[str, Any] = {**SETTINGS, "shards": 2, "evaluate": True, "eval_batch_size": 8}


def test_a_broken_metric_is_found_before_the_first_step(run_folder: str) -> None:
    with pytest.raises(TaskError, match="Held-out batch 0; its samples"):
        lockstep.run(BrokenMetric(first=True), workers=2, out=run_folder, **EVALUATED)
    lines = read_ledger(Path(run_folder, "ledger.jsonl"))
    assert not [line for line in lines if "step" in line.content]
    assert events(run_folder, "first_step") == []


def test_a_metric_that_breaks_after_an_epoch(run_folder: str) -> None:
    with pytest.raises(TaskError, match=r"Held-out batch [1-9]; its samples") as caught:
        lockstep.run(BrokenMetric(first=False), workers=2, out=run_folder, **EVALUATED)
    step, _ = kept(run_folder)
    assert step == -(-SAMPLES // 26)
    assert f"goes on from step-{step:08d}" in caught.value.fix


class BreaksLate(torch.optim.SGD):
    """Raises instead of the update of a late step."""

    lockstep_update = "elementwise"  # as SGD, so that the mended task goes on with its state

    def step(self, closure: Any = None) -> Any:
        if self.param_groups[0]["lr"] < 0.03:
            raise ArithmeticError("the optimizer is broken")
        return super().step(closure)


class LateOptimizer(Vectors):
    def __init__(self, *, breaks: bool) -> None:
        self.breaks = breaks

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        return (BreaksLate if self.breaks else torch.optim.SGD)(params, lr=0.1)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        return LambdaLR(optimizer, lambda step: 0.99**step)


def test_an_update_that_raises(run_folders: Callable[[], str]) -> None:
    """Some blocks may be a step ahead of others: then what is kept is the snapshot, and the ledger
    confirms that, too."""
    folder, settings = run_folders(), {**SETTINGS, "shards": 2, "steps": 400, "data_epochs": None}
    with pytest.raises(TaskError, match="the optimizer is broken"):
        lockstep.run(LateOptimizer(breaks=True), workers=2, out=folder, **settings)
    assert 0 < kept(folder)[0] <= 120  # 0.99 ** 120 * 0.1 is the first below 0.03
    sound = lockstep.run(LateOptimizer(breaks=False), workers=1, out=run_folders(), **settings)
    resumed = lockstep.resume(folder, task=LateOptimizer(breaks=False), quiet=True)
    assert resumed.fingerprint == sound.fingerprint


class Adam(LateOptimizer):
    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=0.1)


def test_a_run_is_not_resumed_with_another_optimizer(run_folder: str) -> None:
    """It is refused, and nothing of the run is lost."""
    settings = {**SETTINGS, "shards": 2, "steps": 400, "data_epochs": None}
    with pytest.raises(TaskError):
        lockstep.run(LateOptimizer(breaks=True), workers=2, out=run_folder, **settings)
    ledger, step = Path(run_folder, "ledger.jsonl").read_bytes(), kept(run_folder)[0]
    with pytest.raises(IntegrityError, match="does not fit the task's model and optimizer"):
        lockstep.resume(run_folder, task=Adam(breaks=False), quiet=True)
    assert Path(run_folder, "ledger.jsonl").read_bytes() == ledger
    assert kept(run_folder)[0] == step
    lockstep.resume(run_folder, task=LateOptimizer(breaks=False), quiet=True)


# The run folder.


@pytest.mark.parametrize("how", ["moved", "removed"])
def test_the_run_folder_goes_away(how: str, tmp_path: Path) -> None:
    folder, other = tmp_path / "run", tmp_path / "other"
    run = lockstep.start(
        Vectors(), workers=1, shards=2, threads=1, batch_size=26, steps=10**6, evaluate=False,
        quiet=True, out=str(folder),
    )  # fmt: skip
    until(lambda: (folder / "events.jsonl").exists() and events(folder, "first_step"), 20, "a step")
    if how == "moved":
        folder.rename(other)
    else:
        shutil.rmtree(folder)
    with pytest.raises(RunFolderError, match=f"was {how} while the run went on") as caught:
        run.result(30)
    assert not folder.exists()
    if how == "moved":
        assert str(other) in caught.value.found
        assert kept(str(other))[0] > 0
