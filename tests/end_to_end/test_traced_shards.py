"""Shards that are run as a list of kernels: the bytes of the plain pass, whatever happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lockstep
from lockstep.errors import NonFiniteError
from lockstep.job.faults import Fault
from tests.support import reference_loop as reference
from tests.support.harmed_runs import assert_struck, events
from tests.support.native_path import native, native_module
from tests.zoo import MORE, ZOO
from tests.zoo.vectors import CLASSES, FEATURES, Vectors

__all__ = ["native", "native_module"]  # fixtures

SHORT = {
    "mlp": True, "onecycle": True, "augmented": True, "left-out": True, "bf16-parameters": True,
    "mixture": False, "cnn": False,
}  # fmt: skip
"""Tasks of the zoo, and whether their loss has a graph."""
TASKS = {**ZOO, **MORE}
LONG = [pytest.param(name, marks=pytest.mark.long) for name in TASKS if name not in SHORT]
ALWAYS: dict[str, Any] = {"threads": 1, "quiet": True, "trace": "always"}


def last_words(folder: str) -> list[tuple[int, str]]:
    """What each worker said last of its traced passes: how many forms, and why no more."""
    said = {
        event["worker"]: (event["forms"], event["why_not"]) for event in events(folder, "traced")
    }
    return list(said.values())


@pytest.mark.parametrize("name", [*SHORT, *LONG])
def test_the_bytes_are_those_of_plain_pytorch(name: str, native: str, run_folder: str) -> None:
    entry = TASKS[name]
    wanted = reference.train(entry.task, shards=6, **entry.settings())
    result = lockstep.run(
        entry.task,
        shards=6,
        workers=2,
        out=run_folder,
        native=native,
        **ALWAYS,
        **entry.settings(),
    )
    assert Path(result.folder, "model.safetensors").read_bytes() == wanted.file()
    if name in SHORT:
        assert all((forms > 0) is SHORT[name] for forms, _ in last_words(run_folder))
        assert last_words(run_folder)
        said = events(run_folder, "traced")
        assert all(event["native"] is (native == "auto" and event["forms"] > 0) for event in said)


class Dropped(Vectors):
    """With dropout: a traced pass draws what the plain one draws."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, 16), nn.Dropout(0.5), nn.GELU(), nn.Linear(16, CLASSES)
        )


def test_random_numbers(native: str, run_folder: str) -> None:
    settings: dict[str, Any] = {"steps": 8, "batch_size": 26, "seed": 3}
    wanted = reference.train(Dropped(), shards=4, **settings)
    result = lockstep.run(
        Dropped(), shards=4, workers=2, out=run_folder, native=native, **ALWAYS, **settings
    )
    assert Path(result.folder, "model.safetensors").read_bytes() == wanted.file()
    assert all(forms > 0 for forms, _ in last_words(run_folder))


def test_nothing_is_traced_where_that_could_pass_for_a_stall(run_folder: str) -> None:
    """Tracing gives no heartbeat; on a busy machine it takes longer than this timeout."""
    settings: dict[str, Any] = {"steps": 4, "batch_size": 26, "stall_seconds": 0.5}
    lockstep.run(Vectors(), shards=4, workers=2, out=run_folder, **ALWAYS, **settings)
    assert last_words(run_folder) == []


def test_workers_die(native: str, run_folder: str) -> None:
    """Before, while and after a worker has traced; its replacement computes the plain way first."""
    settings: dict[str, Any] = {"steps": 20, "batch_size": 26, "seed": 3}
    wanted = reference.train(Vectors(), shards=6, **settings)
    faults = tuple(
        Fault(worker_id=-1, step=step, phase=phase)
        for step, phase in ((1, "forward"), (5, "backward"), (9, "slot"), (13, "update_begin"))
    )
    result = lockstep.run(
        Vectors(),
        shards=6,
        workers=3,
        out=run_folder,
        faults=faults,
        native=native,
        **ALWAYS,
        **settings,
    )
    assert_struck(run_folder, faults)
    assert Path(result.folder, "model.safetensors").read_bytes() == wanted.file()


class Hooked(Vectors):
    """A hook that changes large gradients alone: the first batches do not show it."""

    def model(self) -> nn.Module:
        model = super().model()
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: gradient.clamp(-0.02, 0.02))
        return model


def test_hooks_of_parameters_are_run(run_folder: str) -> None:
    settings: dict[str, Any] = {"steps": 8, "batch_size": 26, "seed": 3}
    wanted = reference.train(Hooked(), shards=2, **settings)
    result = lockstep.run(Hooked(), shards=2, workers=2, out=run_folder, **ALWAYS, **settings)
    assert Path(result.folder, "model.safetensors").read_bytes() == wanted.file()
    assert last_words(run_folder) == [(0, "parameters or modules have hooks")] * 2


class Exploding(Vectors):
    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=3e38)


def test_a_loss_that_becomes_infinite_is_told_as_ever(native: str, run_folder: str) -> None:
    settings = {"steps": 40, "batch_size": 26, "out": run_folder, "native": native, **ALWAYS}
    with pytest.raises(NonFiniteError, match=r"the loss is (nan|inf) at step \d+, shard"):
        lockstep.run(Exploding(), shards=2, workers=2, **settings)
    assert all(forms > 0 for forms, _ in last_words(run_folder))


def test_by_default_only_what_pays_is_traced(run_folder: str) -> None:
    lockstep.run(
        Vectors(), shards=2, workers=2, steps=80, batch_size=26, quiet=True, out=run_folder
    )
    assert events(run_folder, "traced") == []
