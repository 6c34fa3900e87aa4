"""What `Task.loss` returns beside the loss: means over a step's samples, the same for any number of
workers, of hosts and of deaths."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import lockstep
from lockstep.errors import LockstepError, TaskError
from lockstep.job.faults import Fault
from lockstep.results.ledger import read_ledger
from tests.support.harmed_runs import Yard, assert_same, events, ledger, yard
from tests.support.logging_task import BATCH, Logs
from tests.support.multi_host_runs import Site, ended_well, site

__all__ = ["site", "yard"]  # fixtures

SETTINGS: dict[str, Any] = {"batch_size": BATCH, "steps": 12, "seed": 3}
NAMES = ["accuracy", "größe", "noisy", "weight"]


class Silent(Logs):
    """The same, with nothing beside the loss."""

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return super().loss(model, batch)[0]


def lines_of(result: lockstep.Result) -> list[dict[str, Any]]:
    lines = [line.content for line in read_ledger(result.folder / "ledger.jsonl")]
    return [line for line in lines if "step" in line]


def test_means_over_the_samples(yard: Yard) -> None:
    """Compared with the shards' values, put together by hand; and nothing else changes."""
    result = yard.undisturbed(Logs(), **SETTINGS)
    lines = lines_of(result)
    assert [list(line["logged"]) for line in lines] == [NAMES] * 12
    for line in lines:
        # 26 samples in 6 shards; the last step of a data epoch has 5.
        sizes = [4, 4, 5, 4, 4, 5] if line["samples"] == BATCH else [0, 1, 1, 1, 1, 1]
        weight = 0.0
        for size in sizes:
            weight += 0.1 * size * (size / sum(sizes))
        assert float.fromhex(line["logged"]["weight"]) == weight
        hits = float.fromhex(line["logged"]["accuracy"]) * line["samples"]
        assert hits == pytest.approx(round(hits), abs=1e-9)
    assert len({line["logged"]["noisy"] for line in lines}) == 12
    silent = yard.undisturbed(Silent(), **SETTINGS)
    assert silent.fingerprint == result.fingerprint
    assert [line["loss"] for line in lines_of(silent)] == [line["loss"] for line in lines]
    assert all("logged" not in line for line in lines_of(silent))


def test_where_they_are_found(yard: Yard) -> None:
    result = yard.undisturbed(Logs(), **SETTINGS)
    table, last = result.steps_table(), lines_of(result)[-1]
    assert list(table) == ["step", "data_epoch", "samples", "loss", *NAMES]
    assert table["step"] == list(range(12))
    assert {len(column) for column in table.values()} == {12}
    for name in NAMES:
        assert result.metrics[f"train_{name}"] == float.fromhex(last["logged"][name])
        assert result.metrics[f"train_{name}"] == table[name][-1]
        assert name in result.history[0]["metrics"], "the default metrics have them, too"
    assert lockstep.Result.open(result.folder).metrics == result.metrics


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers(yard: Yard, workers: int) -> None:
    assert_same(yard.run(Logs(), workers=workers, **SETTINGS), yard.undisturbed(Logs(), **SETTINGS))


@pytest.mark.parametrize("phase", ["slot", "barrier", "update_done", "commit"])
def test_a_worker_dies(yard: Yard, phase: str) -> None:
    someone = -1 if phase == "slot" else 1  # who has no shard in this step never comes to a slot
    fault = Fault(kind="kill", step=4, phase=phase, worker_id=someone)
    harmed = yard.check(Logs(), workers=2, faults=(fault,), **SETTINGS)
    assert events(harmed.folder, "died")


def test_the_only_worker_dies_and_the_state_is_put_back(yard: Yard) -> None:
    fault = Fault(kind="kill", step=7, phase="update_done", worker_id=0)
    yard.check(Logs(), workers=1, faults=(fault,), **SETTINGS)


def test_stopped_and_resumed(yard: Yard) -> None:
    wanted = yard.undisturbed(Logs(), **SETTINGS)
    folder = Path(yard.path())
    shorter = {**SETTINGS, "checkpoint_steps": 4}
    with pytest.raises(LockstepError):
        yard.run(
            Logs(), out=str(folder), workers=2, **shorter,
            faults=(Fault(worker_id=-1, step=9, phase="forward", shard=3, repeat=True),),
        )  # fmt: skip
    resumed = lockstep.resume(folder, workers=1, task=Logs(), quiet=True)
    assert_same(resumed, wanted)


def test_audited(yard: Yard) -> None:
    fault = Fault(worker_id=-1, kind="flip", step=3, phase="slot", shard=2)
    harmed = yard.check(Logs(), workers=2, faults=(fault,), audit=1.0, **SETTINGS)
    assert events(harmed.folder, "corrupt")


def test_with_local_steps(yard: Yard) -> None:
    settings = {**SETTINGS, "steps": 4, "local_steps": 2, "batch_size": 24, "shards": 3}
    one = yard.run(Logs(), workers=1, **settings)
    assert_same(yard.run(Logs(), workers=3, **settings), one)
    for line in lines_of(one):
        assert list(line["logged"]) == NAMES
        if line["samples"] == 48:  # updates of 8 samples each
            assert float.fromhex(line["logged"]["weight"]) == pytest.approx(0.8)


def test_several_hosts(site: Site, yard: Yard) -> None:
    """One of them has shards of its own alone, and all record the same."""
    settings = {**SETTINGS, "shards": 6, "threads": 1, "quiet": True}
    on = site.agents({"b": 1, "c": 1}, 1)
    task = "tests.support.logging_task:Logs"
    found = lockstep.run(task, on=on, workers=3, out=yard.path(), **settings)
    assert_same(found, lockstep.run(task, workers=1, out=yard.path(), **settings))
    ended_well(on)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("list", "did not return a loss"),
        ("none", "did not return a loss"),
        ("three", "did not return a loss"),
        ("mapping first", "did not return a loss"),
        ("taken", "cannot log a value under the name 'loss'"),
        ("no name", "cannot log a value under the name 3"),
        ("matrix", "the value 'scores' .* cannot be averaged"),
        ("wrong length", "the value 'classes' .* cannot be averaged"),
        ("text", "the value 'text' .* cannot be averaged"),
        ("many", "too many values"),
        ("by the shard", "other values beside the loss for shard"),
        ("by the step", "other values beside the loss at step 5 than before"),
        ("not any more", "other values beside the loss at step 5 than before"),
        ("remembers", "something remembers"),
        ("unseeded", "got different results"),
    ],
)
def test_refused_by_name(yard: Yard, form: str, message: str) -> None:
    folder = Path(yard.path())
    with pytest.raises(TaskError, match=message):
        yard.run(Logs(form), workers=2, out=str(folder), **SETTINGS)
    if form in ("by the step", "not any more"):
        kept = [path.name for path in (folder / "checkpoints").iterdir()]
        assert kept == ["step-00000005"], "what was committed last is kept"


def test_a_loss_alone_is_as_ever(yard: Yard) -> None:
    result = yard.run(Logs("alone"), workers=2, **{**SETTINGS, "steps": 2})
    assert b"logged" not in ledger(result.folder)
    assert [name for name in result.metrics if name.startswith("train_")] == ["train_loss"]


class Untold(Logs):
    """Without a look at its position, which keeps shards from being traced."""

    set_position = lockstep.Task.set_position

    def loss(self, model: nn.Module, batch: Any) -> Any:
        scores = model(batch[0])
        loss = functional.cross_entropy(scores, batch[1])
        return loss, {"accuracy": scores.argmax(1) == batch[1]}


def test_shards_that_log_are_not_traced(yard: Yard) -> None:
    found = yard.run(Untold(), workers=2, trace="always", **SETTINGS)
    assert_same(found, yard.run(Untold(), workers=2, trace="never", **SETTINGS))
    assert not events(found.folder, "traced")


def test_what_is_compiled_cannot_log(yard: Yard) -> None:
    with pytest.raises(TaskError, match="the loss cannot be compiled") as error:
        yard.run(Untold(), workers=2, compile=True, **SETTINGS)
    assert error.value.found == "the graph gives more than the loss"


def test_not_a_number_is_logged_as_such(yard: Yard) -> None:
    class LogsNan(Logs):
        def loss(self, model: nn.Module, batch: Any) -> Any:
            loss, _ = super().loss(model, batch)
            return loss, {"sometimes": torch.tensor(torch.nan)}

    result = yard.run(LogsNan(), workers=2, **{**SETTINGS, "steps": 2})
    assert math.isnan(result.metrics["train_sometimes"])
    assert math.isnan(lockstep.Result.open(result.folder).metrics["train_sometimes"])
