"""Weighted and length-grouped sampling: a function of seed and data epoch alone, for any number of
workers and hosts, where a worker dies, and where a run is resumed or verified."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lockstep
from lockstep.errors import DataError, LockstepError
from lockstep.job.faults import Fault
from tests.support import reference_loop as reference
from tests.support.drawing_task import FEATURES, SAMPLES, Grouped, Still, Weighted
from tests.support.harmed_runs import Yard, assert_same, events, yard
from tests.support.multi_host_runs import Site, ended_well, site

__all__ = ["site", "yard"]  # fixtures

SETTINGS: dict[str, Any] = {"batch_size": 16, "steps": 14, "seed": 3, "shards": 3}
TASKS = [Weighted, Grouped]


class Alone(Weighted):
    """Returns the loss alone, as the reference needs it."""

    def loss(self, model: Any, batch: Any) -> Any:
        return super().loss(model, batch)[0]


def test_the_loop_with_weighted_random_sampler(yard: Yard) -> None:
    """Two data epochs and a half; what is drawn again is augmented anew."""
    found = yard.run(Alone(), workers=2, **SETTINGS)
    wanted = reference.train(Alone(), **SETTINGS)
    assert (found.folder / "model.safetensors").read_bytes() == wanted.file()


@pytest.mark.parametrize("task", TASKS)
def test_any_number_of_workers(yard: Yard, task: type[Weighted]) -> None:
    one = yard.run(task(), workers=1, **SETTINGS)
    assert_same(yard.run(task(), workers=2, loaders=0, **SETTINGS), one)
    assert_same(yard.run(task(), workers=3, loaders=1, **SETTINGS), one)
    plain = yard.undisturbed(type("Plain", (task,), PLAIN)(), **SETTINGS)
    assert plain.fingerprint != one.fingerprint


PLAIN = dict.fromkeys(("sample_weights", "sample_lengths"), lambda self, data: None)


def test_what_it_is_for(yard: Yard) -> None:
    """The small class comes as often as the other: of a tenth of the samples, half of the draws."""
    shares = yard.run(Weighted(), workers=2, **{**SETTINGS, "steps": 60}).steps_table()["share"]
    assert sum(shares) / len(shares) == pytest.approx(0.5, abs=0.06)  # 900 draws: 3.6 deviations
    plain = yard.run(Weighted(power=0.0), workers=2, **{**SETTINGS, "steps": 60})
    assert sum(plain.steps_table()["share"]) / 60 == pytest.approx(0.1, abs=0.04)


@pytest.mark.parametrize("task", TASKS)
def test_a_worker_dies(yard: Yard, task: type[Weighted]) -> None:
    faults = (
        Fault(kind="kill", step=4, phase="barrier", worker_id=1),
        Fault(kind="kill", step=9, phase="barrier", worker_id=0),
    )
    harmed = yard.check(task(), workers=2, faults=faults, **SETTINGS)
    assert len(events(harmed.folder, "died")) == 2


def stopped(yard: Yard, task: lockstep.Task) -> Path:
    """A run that has ended at step 9, with a checkpoint at step 8."""
    folder = Path(yard.path())
    fault = Fault(worker_id=-1, step=9, phase="forward", shard=2, repeat=True)
    with pytest.raises(LockstepError, match="drawn as the task says"):
        yard.run(task, out=str(folder), workers=2, checkpoint_steps=4, faults=(fault,), **SETTINGS)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_resumed_and_verified(yard: Yard, task: type[Weighted]) -> None:
    folder = stopped(yard, task())
    resumed = lockstep.resume(folder, workers=1, task=task(), quiet=True)
    assert_same(resumed, yard.undisturbed(task(), **SETTINGS))
    verified = lockstep.verify(folder, task=task(), workers=3, quiet=True)
    assert (verified.first, verified.last) == (0, SETTINGS["steps"])


def test_other_weights_are_refused(yard: Yard) -> None:
    """They are in the manifest's identity, and so in the ledger's first line."""
    folder = stopped(yard, Weighted())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["identity"]["sample_order"].startswith("weighted ")
    with pytest.raises(DataError, match="drawn in another order"):
        lockstep.resume(folder, task=Weighted(power=0.5), quiet=True)
    ended = yard.undisturbed(Weighted(), **SETTINGS).folder
    with pytest.raises(DataError, match="drawn in another order"):
        lockstep.verify(ended, task=Weighted(power=0.5), quiet=True)
    plain = yard.undisturbed(type("Plain", (Weighted,), PLAIN)(), **SETTINGS)
    identity = json.loads((plain.folder / "manifest.json").read_text())["identity"]
    assert "sample_order" not in identity, "identities of other runs stay as they are"


def test_with_local_steps(yard: Yard) -> None:
    settings = {**SETTINGS, "steps": 4, "local_steps": 2}
    one = yard.run(Weighted(), workers=1, **settings)
    assert_same(yard.run(Weighted(), workers=3, **settings), one)


@pytest.mark.long
@pytest.mark.parametrize("data", ["build", "ship"])
def test_several_hosts(site: Site, yard: Yard, data: str) -> None:
    settings = {**SETTINGS, "shards": 6, "threads": 1, "quiet": True, "data": data}
    on = site.agents({"b": 1, "c": 1}, 1)
    task = f"tests.support.drawing_task:{'Still' if data == 'ship' else 'Weighted'}"
    found = lockstep.run(task, on=on, workers=3, out=yard.path(), **settings)
    assert_same(found, lockstep.run(task, workers=1, out=yard.path(), **settings))
    ended_well(on)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.full((SAMPLES,), -1.0), "0 or more, and finite"),
        (torch.zeros(SAMPLES), "a sum above 0"),
        (torch.ones(SAMPLES - 1), rf"one number per sample\n.*\n.*\[{SAMPLES - 1}\]"),
    ],
)
def test_bad_weights_are_refused_before_the_first_step(
    yard: Yard, weights: torch.Tensor, message: str
) -> None:
    class Bad(Weighted):
        def sample_weights(self, data: Any) -> Any:
            return weights

    with pytest.raises(DataError, match=message):
        yard.run(Bad(), workers=1, **SETTINGS)


def labelled() -> Any:
    return Still().train_data()


def balanced(data: Any) -> Any:
    return (1 / torch.bincount(data.labels))[data.labels]


def test_of_a_module(yard: Yard) -> None:
    """As numbers, or as a function of the data set."""

    def made(weights: Any) -> lockstep.Task:
        return lockstep.from_module(
            torch.nn.Linear(FEATURES, 2), labelled, torch.nn.functional.cross_entropy,
            functools.partial(torch.optim.SGD, lr=0.1), sample_weights=weights,
        )  # fmt: skip

    torch.manual_seed(0)
    module, same = made(balanced), made(balanced(labelled()).tolist())
    same._model = module._model  # type: ignore[attr-defined]
    one = yard.run(module, workers=1, **SETTINGS)
    assert yard.run(same, workers=2, **SETTINGS).fingerprint == one.fingerprint
