"""The adapters: the bits of the loop that a user would write, for any number of workers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import Dataset

import lockstep
from lockstep.adapters.module import ModuleTask
from lockstep.errors import JobError, LockstepError, TaskError
from lockstep.job.code_digest import code_digest
from lockstep.job.task import Task
from tests.support import reference_loop as reference
from tests.support.named_tasks import CLASSES, FEATURES, Blobs, blobs

NUMBERS: dict[str, Any] = {"batch_size": 16, "steps": 9, "seed": 5, "eval_batch_size": 8}


def assert_same(
    make: Callable[[], Task],
    plain: Task,
    folder: Callable[[], str],
    among: tuple[int, ...] = (1, 2, 3),
) -> None:
    """One shard is the plain loop; three are the documented sum, whoever computes them.

    `plain` holds what a user's own loop would call, and `reference` is that loop.
    """
    settings: dict[str, Any] = {**NUMBERS, "threads": 1, "quiet": True}
    alone = lockstep.run(make(), workers=1, shards=1, out=folder(), **settings)
    wanted = reference.train_unsharded(plain, **NUMBERS)
    assert (alone.folder / "model.safetensors").read_bytes() == wanted.file()
    summed = reference.train(plain, shards=3, **NUMBERS)
    results = [
        lockstep.run(make(), workers=workers, shards=3, out=folder(), **settings)
        for workers in among
    ]
    assert len({result.fingerprint for result in results}) == 1
    for result in results:
        assert (result.folder / "model.safetensors").read_bytes() == summed.file()
        _, metrics = summed.evaluations[-1]
        assert metrics.items() <= result.metrics.items()
        assert result.metrics == results[0].metrics


# Modules.


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return scores.argmax(1) == labels


def per_sample(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(scores, labels, reduction="none")


def from_blobs(**more: Any) -> Task:
    return lockstep.from_module(
        Blobs().model,
        functools.partial(blobs, 104, seed=1),
        nn.CrossEntropyLoss(),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        eval_dataset=blobs(30, seed=2),
        scheduler=functools.partial(StepLR, step_size=2),
        metrics={"accuracy": accuracy, "exact": per_sample},
        **more,
    )


class PlainBlobs(Blobs):
    def train_data(self) -> Dataset[Any]:
        return blobs(104, seed=1)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return StepLR(optimizer, step_size=2)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        scores = model(batch[0])
        return {
            "loss": functional.cross_entropy(scores, batch[1]),
            "accuracy": accuracy(scores, batch[1]),
            "exact": per_sample(scores, batch[1]),
        }


def test_a_module(run_folders: Callable[[], str]) -> None:
    assert_same(from_blobs, PlainBlobs(), run_folders, among=(1, 3))


def test_a_module_with_its_weights_and_a_collate(run_folders: Callable[[], str]) -> None:
    """The module that was handed over is trained, and stays as it was where it came from."""
    model = Blobs().model()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def collate(samples: list[Any]) -> Any:
        return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])

    task = lockstep.from_module(
        model, blobs(20, seed=1), functional.cross_entropy, torch.optim.SGD, collate=collate
    )
    result = lockstep.run(task, steps=1, workers=1, batch_size=20, quiet=True, out=run_folders())
    trained = result.model().state_dict()
    assert not torch.equal(trained["0.weight"], before["0.weight"])
    assert torch.allclose(trained["0.weight"], before["0.weight"], atol=0.1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_code_is_the_users() -> None:
    """The manifest's digest tells tasks of one adapter apart by the code that they are made of."""
    one = lockstep.from_module(nn.Identity, blobs(9, seed=1), accuracy, torch.optim.SGD)
    other = lockstep.from_module(nn.Identity, blobs(9, seed=1), reference.add, torch.optim.SGD)
    assert isinstance(one, ModuleTask)
    assert code_digest(one) != code_digest(other)


# What is refused.


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (
            lambda: lockstep.from_module(nn.Identity, blobs(9, 1), "mse", torch.optim.SGD),  # type: ignore[arg-type]
            JobError,
            "loss cannot be called",
        ),
        (
            lambda: from_blobs(collate=4),
            JobError,
            "collate cannot be called",
        ),
    ],
)
def test_arguments_that_are_refused(
    make: Callable[[], Task], kind: type[LockstepError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        make()


def test_batches_that_are_no_pairs() -> None:
    task = from_blobs()
    with pytest.raises(TaskError, match=r"not a pair.*\n.*\n.*dict of x"):
        task.loss(nn.Identity(), {"x": torch.zeros(1)})


@pytest.mark.parametrize("extra", ["transformers", "lightning"])
def test_a_missing_extra(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lockstep.adapters.common import need

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(JobError, match=rf"pip install 'lockstep-dlp\[{extra}\]'"):
        need(extra, extra)


def frozen_backbone() -> nn.Module:
    """A module whose first part is in eval mode."""
    backbone = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8)).requires_grad_(False).eval()
    return nn.Sequential(backbone, nn.Linear(8, CLASSES))


@pytest.mark.parametrize("keep_modes", [True, False])
def test_a_module_in_eval_mode(keep_modes: bool, run_folders: Callable[[], str]) -> None:
    task = lockstep.from_module(
        frozen_backbone, functools.partial(blobs, 40, seed=1), nn.CrossEntropyLoss(),
        functools.partial(torch.optim.SGD, lr=0.1), keep_modes=keep_modes,
    )  # fmt: skip
    result = lockstep.run(
        task, workers=1, shards=2, threads=1, batch_size=8, out=run_folders(), quiet=True
    )
    learned = result.model().state_dict()["0.1.running_mean"]
    assert torch.equal(learned, torch.zeros(8)) == keep_modes
